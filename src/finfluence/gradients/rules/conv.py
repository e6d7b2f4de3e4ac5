"""nn.Conv1d, Conv2d, Conv3d: y = conv(a, W) + b, so ⟨δ, conv(a, q_W) + q_b⟩ with the layer's own convolution."""

from __future__ import annotations

from torch import nn

from finfluence.gradients.rules._registry import Call, register
from finfluence.gradients.rules.linear import matmul_dtype


@register(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    needs_input=["weight"],
    feature_dims=lambda module, ndim: 1 + len(module.kernel_size),
    matmul=True,
)
def conv(call: Call) -> None:
    """einsum("bgo...,bgko...->bk", δ, conv(a, q)) with the directions stacked as output channels of each group g."""
    module, groups = call.module, call.module.groups
    dtype = matmul_dtype(call.delta.dtype)
    if call.input is not None:
        source, delta = call.source.to(dtype), call.delta.to(dtype).unflatten(1, (groups, 1, -1))
        for directions, q in call.queries.dense("weight", dtype=dtype):
            channels = q.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
            # _conv_forward is the layer's own convolution: stride, dilation, groups and every padding mode.
            image = module._conv_forward(source, channels, None).unflatten(1, (groups, len(directions), -1))
            per_row = image.mul_(delta).flatten(4).sum(dim=(1, 3, 4), dtype=call.accumulate)
            call.add(directions, call.samples(per_row, keep=1))
    if call.queries.dense("bias", dtype=call.accumulate):
        call.add_affine("bias", call.samples(call.delta.flatten(2).sum(-1, dtype=call.accumulate), keep=1))
