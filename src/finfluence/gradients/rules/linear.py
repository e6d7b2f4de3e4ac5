"""nn.Linear: y = x Wᵀ + b, so ⟨δ, x q_Wᵀ + q_b⟩, dense or from the factors of q_W."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finfluence.gradients.rules._registry import Call, register, register_gradients


@register(nn.Linear, needs_input=["weight"], feature_dims=lambda module, ndim: 1, matmul=True)
def linear(call: Call) -> None:
    """einsum("no,ni,koi->nk", δ, x, q) summed over a sample's rows n, contracted from the cheaper side."""
    if call.input is not None:
        _weight(call)
    if call.queries.dense("bias", dtype=call.accumulate):
        call.add_affine("bias", call.samples(call.delta, keep=1))


@register_gradients(nn.Linear)
def linear_gradients(call: Call) -> dict[str, Tensor]:
    """einsum("bno,bni->boi", δ, x) and the sum of δ over a sample's rows n."""
    delta = call.by_sample(call.delta, keep=1).to(call.accumulate)
    found = {"bias": delta.sum(1)}
    if call.input is not None:
        found["weight"] = delta.mT @ call.by_sample(call.source, keep=1).to(call.accumulate)
    return found


def _weight(call: Call) -> None:
    d_out, d_in = call.module.weight.shape
    x = call.source.reshape(-1, d_in)
    delta = call.delta.reshape(-1, d_out)
    dtype = matmul_dtype(call.delta.dtype)
    factors = call.queries.factored(dtype=dtype)
    if factors is not None:
        directions, rows, row_deltas, membership = factors
        inner = (x.to(rows.dtype) @ rows.mT).mul_(delta.to(rows.dtype) @ row_deltas.mT)
        call.add(directions, call.samples(inner.unflatten(0, call.delta.shape[:-1]), keep=1) @ membership)
    groups = call.queries.dense("weight", dtype=dtype)
    if not groups:
        return
    x, delta = (t if t.dtype == dtype else t.to(dtype) for t in (x, delta))
    for directions, q in groups:
        # The intermediate has the smaller of the two widths: less memory and a cheaper last reduction.
        if d_out <= d_in:
            image, other = _product(x, q.mT), delta
        else:
            image, other = _product(delta, q), x
        call.add(directions, call.rows_to_samples(image.mul_(other)))


def _product(rows: Tensor, matrices: Tensor) -> Tensor:
    """(n, a) times (k, a, c) → (k, n, c)."""
    if matrices.shape[0] == 1:
        return (rows @ matrices[0]).unsqueeze(0)
    return rows @ matrices


def matmul_dtype(delta: torch.dtype) -> torch.dtype:
    """The dtype to contract in: the output gradient's own where it is bfloat16, float32 for float16.

    float16 would overflow or lose the direction's small entries, bfloat16 has float32's range. Its rounding is random
    from entry to entry and averages out over a matrix.
    """
    return delta if delta in (torch.bfloat16, torch.float32, torch.float64) else torch.float32
