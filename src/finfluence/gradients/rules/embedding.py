"""nn.Embedding: y = W[index], so ⟨δ, q[index]⟩."""

from __future__ import annotations

from torch import nn

from finfluence.gradients.rules._registry import Call, register


@register(nn.Embedding, needs_input=["weight"], feature_dims=lambda module, ndim: 1, parameters=["weight"])
def embedding(call: Call) -> None:
    """einsum("...d,...d->...", δ, q[index]), without the rows of padding_idx, which get no gradient."""
    index = call.source
    delta = call.delta.to(call.accumulate)
    padding = call.module.padding_idx
    if padding is not None:
        delta = delta * (index != padding).unsqueeze(-1)
    for directions, stacked in call.queries.dense("weight", dtype=call.module.weight.dtype):
        for column, q in zip(directions, stacked, strict=True):
            product = q[index].to(call.accumulate).mul_(delta)
            call.add([column], call.samples(product.sum(-1)).unsqueeze(1))
