"""The gradient of a measurement leaves no trace in the model, and refuses what has no gradient."""

import pytest
import torch
from gradient_cases import Transformer, data, squares, trainable
from torch import nn

from finfluence.errors import InputError
from finfluence.gradients import Direction, query_gradient


def test_query_gradient_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    model[1].eval()
    model[3].weight.grad = torch.ones(2, 6, dtype=torch.float64)
    flags = [m.training for m in model.modules()]
    x = data(5, 4)

    def measure(m):
        assert not m[2].training
        torch.rand(3)  # a measurement that draws random numbers
        m[1].running_mean.add_(1.0)  # and one that changes a buffer
        return squares(m(x)).mean()

    rng, mean = torch.get_rng_state(), model[1].running_mean.clone()
    with torch.no_grad():
        q = query_gradient(model, trainable(model), measure, factors=True)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[1].running_mean, mean)
    assert [m.training for m in model.modules()] == flags
    assert model[0].weight.grad is None
    assert torch.equal(model[3].weight.grad, torch.ones(2, 6, dtype=torch.float64))
    assert not any(m._forward_hooks for m in model.modules())

    model.eval()
    model[1].running_mean.add_(1.0)
    expected = torch.autograd.grad(squares(model(x)).mean(), list(model.parameters()))
    for (name, _), g in zip(model.named_parameters(), expected, strict=True):
        assert torch.allclose(q.tensors[name], g)


def test_tied_and_functional_weights_have_no_factors():
    torch.manual_seed(0)
    for functional in (False, True):
        model = Transformer(d=40, vocabulary=30, functional_head=functional).double()
        ids = torch.randint(1, 30, (1, 4))
        q = query_gradient(model, trainable(model), lambda m, ids=ids: squares(m(ids)).mean(), factors=True)
        assert "head" not in q.factors
        assert {"blocks.0.qkv", "blocks.1.mlp.3"} <= set(q.factors)


def test_unused_parameters_are_missing():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    q = query_gradient(model, trainable(model), lambda m: m["used"](torch.ones(3, 2)).mean())
    assert set(q.tensors) == {"used.weight", "used.bias"}


def without_gradient(m):
    with torch.no_grad():
        return m(torch.ones(3, 2)).mean()


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda m: m(torch.ones(3, 2)), r"shape \(3, 1\).*mean"),
        (lambda m: 1.0, "got float"),
        (lambda m: m(torch.ones(3, 2)).mean() * float("nan"), "value is nan"),
        (without_gradient, "no_grad"),
        (lambda m: m(torch.ones(3, 2)).mean().detach(), "detached"),
        (lambda m: (m.weight.sum() * 0).abs().sqrt() + 1.0, "gradient of 'weight' is not finite"),
    ],
)
def test_bad_measurements_are_refused(measure, message):
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match=message):
        query_gradient(model, trainable(model), measure)


def test_direction_arithmetic():
    a, b = data(3, 4), data(5)
    q = Direction({"a": a, "b": b})
    scaled = q.scaled(2.0).scaled(-0.25)
    assert torch.equal(scaled.tensors["a"], -0.5 * a)
    assert torch.equal(q.tensors["a"], a)
    index, values = torch.tensor([[0, 2]]), data(2, 4, seed=7)
    gradients = {"a": torch.sparse_coo_tensor(index, values, (3, 4), check_invariants=True), "b": None, "c": data(2)}
    assert float(scaled.dot(gradients)) == pytest.approx(-0.5 * float((a[[0, 2]] * values).sum()), rel=1e-12)
    assert float(q.dot({"c": data(2)})) == 0.0
