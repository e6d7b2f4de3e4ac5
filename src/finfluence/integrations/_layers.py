"""Closed forms for layers that Transformers defines itself."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from finfluence.gradients.rules._registry import _RULES, Call, register
from finfluence.gradients.rules.linear import matmul_dtype


def register_layers() -> None:
    """Make the closed forms known to the recording hooks, once."""
    if Conv1D not in _RULES:
        register(Conv1D, needs_input=["weight"], feature_dims=lambda module, ndim: 1, matmul=True)(transposed_linear)


def transposed_linear(call: Call) -> None:
    """GPT-2's y = x W + b: einsum("nio,...i,...o->...n", q, x, δ), and Σ δ q_b."""
    if call.input is not None:
        dtype = matmul_dtype(call.delta.dtype)
        x, delta = call.source.to(dtype), call.delta.to(dtype)
        for directions, stacked in call.queries.dense("weight", dtype=dtype):
            for column, q in zip(directions, stacked, strict=True):
                per_entry = (x @ q).mul_(delta).sum(-1, dtype=call.accumulate)
                call.add([column], call.samples(per_entry.unsqueeze(-1), keep=1))
    if call.queries.dense("bias", dtype=call.accumulate):
        call.add_affine("bias", call.samples(call.delta, keep=1))
