"""Recording inside a first-order pass that is differentiated again.

Protects: replays and users who record with create_graph=True. The double backward runs through the same hooks.
"""

from __future__ import annotations

import torch
from torch import nn

from finfluence.gradients import Direction, HookedDerivatives


def test_a_later_double_backward_changes_nothing_and_may_be_batched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parameters = dict(model.named_parameters())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    directions = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in parameters.items()}

    def gradient(*, create_graph: bool):
        loss = nn.functional.cross_entropy(model(x), y)
        return torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)

    plain = torch.autograd.grad(
        gradient(create_graph=True), list(parameters.values()), list(directions.values()), is_grads_batched=True
    )
    hooks = HookedDerivatives(model, parameters)
    values = []
    for create_graph in (False, True):
        along = [Direction({name: d[k] for name, d in directions.items()}) for k in range(2)]
        with hooks.record(along, 5) as recording:
            first = gradient(create_graph=create_graph)
        values.append(recording.values.clone())
    products = torch.autograd.grad(
        first, list(parameters.values()), list(directions.values()), is_grads_batched=True, retain_graph=True
    )
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    torch.testing.assert_close(recording.values, values[1], rtol=0, atol=0)
    for found, expected in zip(products, plain, strict=True):
        torch.testing.assert_close(found, expected)
    hooks.remove()
