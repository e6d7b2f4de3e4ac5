"""nn.Embedding: y = W[index], so ⟨δ, q[index]⟩."""

from __future__ import annotations

from torch import Tensor, nn

from finfluence.gradients.rules._registry import Call, register, register_gradients


@register(nn.Embedding, needs_input=["weight"], feature_dims=lambda module, ndim: 1, parameters=["weight"])
def embedding(call: Call) -> None:
    """einsum("...d,...d->...", δ, q[index]), without the rows of padding_idx, which get no gradient."""
    index, delta = call.source, _delta(call)
    for directions, stacked in call.queries.dense("weight", dtype=call.module.weight.dtype):
        for column, q in zip(directions, stacked, strict=True):
            product = q[index].to(call.accumulate).mul_(delta)
            call.add([column], call.samples(product.sum(-1)).unsqueeze(1))


@register_gradients(nn.Embedding)
def embedding_gradients(call: Call) -> dict[str, Tensor]:
    """Every sample's δ added to the rows that it looked up."""
    index, delta = call.by_sample(call.source, keep=0), call.by_sample(_delta(call), keep=1)
    found = delta.new_zeros(call.batch_size, *call.module.weight.shape)
    return {"weight": found.scatter_add_(1, index.unsqueeze(-1).expand_as(delta), delta)}


def _delta(call: Call) -> Tensor:
    delta, padding = call.delta.to(call.accumulate), call.module.padding_idx
    return delta if padding is None else delta * (call.source != padding).unsqueeze(-1)
