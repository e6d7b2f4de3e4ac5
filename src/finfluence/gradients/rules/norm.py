"""LayerNorm, RMSNorm, GroupNorm: y = x̂ · w + b, so the per-sample gradients Σ_t δ x̂ and Σ_t δ are themselves small."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finfluence.gradients.rules._registry import Call, register


@register(nn.LayerNorm, needs_input=["weight"], feature_dims=lambda module, ndim: len(module.normalized_shape))
def layer_norm(call: Call) -> None:
    """einsum("...d,...d->bd", δ, x̂) · q_w + einsum("...d->bd", δ) · q_b, x̂ the normalised input."""
    module = call.module
    _affine(
        call,
        lambda x: F.layer_norm(x, module.normalized_shape, eps=module.eps),
        sum_features=lambda t: call.samples(t, keep=len(module.normalized_shape)),
    )


@register(
    nn.RMSNorm,
    needs_input=["weight"],
    feature_dims=lambda module, ndim: len(module.normalized_shape),
    parameters=["weight"],
)
def rms_norm(call: Call) -> None:
    """einsum("...d,...d->bd", δ, x̂) · q_w."""
    module = call.module
    _affine(
        call,
        lambda x: F.rms_norm(x, module.normalized_shape, eps=module.eps),
        sum_features=lambda t: call.samples(t, keep=len(module.normalized_shape)),
    )


@register(nn.GroupNorm, needs_input=["weight"], feature_dims=lambda module, ndim: ndim - 1)
def group_norm(call: Call) -> None:
    """einsum("bc...,bc...->bc", δ, x̂) · q_w + einsum("bc...->bc", δ) · q_b."""
    module = call.module
    _affine(
        call,
        lambda x: F.group_norm(x, module.num_groups, eps=module.eps),
        sum_features=lambda t: call.samples(t.flatten(2).sum(-1) if t.ndim > 2 else t, keep=1),
    )


def _affine(call: Call, normalise: Callable[[Tensor], Tensor], *, sum_features: Callable[[Tensor], Tensor]) -> None:
    delta = call.delta.to(call.accumulate)
    if call.input is not None and call.queries.dense("weight", dtype=call.accumulate):
        normalised = normalise(call.source.to(torch.promote_types(call.source.dtype, torch.float32)))
        call.add_affine("weight", sum_features(normalised.to(call.accumulate).mul_(delta)))
    if call.queries.dense("bias", dtype=call.accumulate):
        call.add_affine("bias", sum_features(delta))
