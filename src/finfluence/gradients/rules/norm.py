"""LayerNorm, RMSNorm, GroupNorm: y = x̂ · w + b, so the per-sample gradients Σ_t δ x̂ and Σ_t δ are themselves small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finfluence.gradients.rules._registry import Call, register, register_gradients


@register(nn.LayerNorm, needs_input=["weight"], feature_dims=lambda module, ndim: len(module.normalized_shape))
def layer_norm(call: Call) -> None:
    """einsum("...d,...d->bd", δ, x̂) · q_w + einsum("...d->bd", δ) · q_b, x̂ the normalised input."""
    _affine(call)


@register(
    nn.RMSNorm,
    needs_input=["weight"],
    feature_dims=lambda module, ndim: len(module.normalized_shape),
    parameters=["weight"],
)
def rms_norm(call: Call) -> None:
    """einsum("...d,...d->bd", δ, x̂) · q_w."""
    _affine(call)


@register(nn.GroupNorm, needs_input=["weight"], feature_dims=lambda module, ndim: ndim - 1)
def group_norm(call: Call) -> None:
    """einsum("bc...,bc...->bc", δ, x̂) · q_w + einsum("bc...->bc", δ) · q_b."""
    _affine(call)


@register_gradients(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
def norm_gradients(call: Call) -> dict[str, Tensor]:
    """Σ δ x̂ and Σ δ over a sample's rows."""
    return {name: _per_sample(call, name) for name in ("weight", "bias") if name == "bias" or call.input is not None}


def _affine(call: Call) -> None:
    for name in ("weight", "bias"):
        if (name == "bias" or call.input is not None) and call.queries.dense(name, dtype=call.accumulate):
            call.add_affine(name, _per_sample(call, name))


def _per_sample(call: Call, name: str) -> Tensor:
    delta = call.delta.to(call.accumulate)
    if name == "weight":
        normalised = _normalised(call.module, call.source.to(torch.promote_types(call.source.dtype, torch.float32)))
        delta = normalised.to(call.accumulate).mul_(delta)
    if isinstance(call.module, nn.GroupNorm):
        return call.samples(delta.flatten(2).sum(-1) if delta.ndim > 2 else delta, keep=1)
    return call.samples(delta, keep=len(call.module.normalized_shape))


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    assert isinstance(module, nn.RMSNorm)
    return F.rms_norm(x, module.normalized_shape, eps=module.eps)
