"""Live sensitivities. Protects: the preconditioner is the optimizer's own, and SGD stays a pure scale."""

import importlib

import pytest
import torch

from finfluence.errors import InputError
from finfluence.sensitivity import (
    SGD,
    Adam,
    AdamW,
    ParameterRule,
    SGDRule,
    from_torch,
    live_direction,
    live_directions,
    live_scale,
)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("configuration", "scale"),
    [
        (SGD(lr=0.1), -0.1),
        (SGD(lr=0.1, weight_decay=0.5), -0.1),
        (SGD(lr=0.1, momentum=0.9, dampening=0.25), -0.075),
        (SGD(lr=0.1, momentum=0.9, nesterov=True), -0.19),
    ],
    ids=repr,
)
def test_sgd_is_a_scale_and_the_true_derivative_of_the_step(configuration, scale):
    rule = configuration.rule
    theta, gradient, query = _random(5, seed=1), _random(5, seed=2), _random(2, 5, seed=3)
    assert live_scale(rule, 0.1) == pytest.approx(scale, rel=1e-12)
    live = live_direction(rule, rule.init(theta), query, lr=0.1, step=4)
    torch.testing.assert_close(live, query * scale)

    def stepped(gradient):
        return rule.update(theta, rule.init(theta), gradient, lr=0.1, step=4)[0]

    direction = _random(5, seed=4)
    moved = (stepped(gradient + direction) - stepped(gradient - direction)) / 2
    torch.testing.assert_close(live @ direction, query @ moved)


def test_first_step_of_sgd_is_not_dampened():
    rule = SGDRule(momentum=0.9, dampening=0.25)
    assert live_scale(rule, 0.1, step=0) == pytest.approx(-0.1)
    query = _random(3, seed=1)
    torch.testing.assert_close(live_direction(rule, {}, query, lr=0.1), -0.1 * query)
    torch.testing.assert_close(live_direction(rule, {"momentum_buffer": torch.zeros(3)}, query, lr=0.1), -0.075 * query)


@pytest.mark.parametrize("configuration", [Adam(lr=0.01, betas=(0.8, 0.95)), AdamW(lr=0.01, betas=(0.8, 0.95))])
def test_adam_uses_the_second_moment_before_the_step(configuration):
    """Against the derivative of an update whose second moment and bias correction keep their old values."""
    parameter = _random(2, 3, seed=1).requires_grad_()
    optimizer = configuration.build([parameter])
    query = _random(4, 2, 3, seed=2)
    assert live_scale(configuration.rule, 0.01) is None
    empty = live_direction(configuration.rule, optimizer.state.get(parameter, {}), query, lr=0.01)
    assert not empty.any()
    for step in range(3):
        parameter.grad = _random(2, 3, seed=10 + step)
        optimizer.step()
    state = optimizer.state[parameter]
    v_hat = state["exp_avg_sq"] / (1 - 0.95**3)

    def moved(gradient):
        first = (0.8 * state["exp_avg"] + 0.2 * gradient) / (1 - 0.8**4)
        return -0.01 * first / (v_hat.sqrt() + 1e-8)

    live = live_direction(configuration.rule, state, query, lr=0.01)
    direction = _random(2, 3, seed=5)
    expected = (query * (moved(direction) - moved(-direction)) / 2).sum((-1, -2))
    torch.testing.assert_close((live * direction).sum((-1, -2)), expected)


def test_elements_without_second_moment_get_zero():
    """An embedding row that training has not seen: a sign step, whose derivative is zero, and not 1/eps."""
    state = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.tensor([0.0, 1.0]), "step": torch.tensor(5.0)}
    live = live_direction(Adam().rule, state, torch.ones(2), lr=0.1)
    assert live[0] == 0
    assert live[1] < 0


class _Doubled:
    def init(self, theta):
        return {}

    def update(self, theta, state, grad, *, lr, step):
        return theta - 2 * lr * grad, {}


def test_a_users_rule_is_differentiated():
    query = _random(2, 3, seed=1)
    with pytest.raises(InputError, match="_Doubled"):
        live_direction(_Doubled(), {}, query, lr=0.1)
    live = live_direction(_Doubled(), {}, query, lr=0.1, theta=_random(3, seed=2))
    torch.testing.assert_close(live, -0.2 * query)
    assert live_scale(_Doubled(), 0.1) is None


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_many_parameters_together_get_what_each_gets_alone(monkeypatch, chunk):
    """Several groups, a rule of the user's, a parameter that has not been updated, elements without a second moment."""
    monkeypatch.setattr(importlib.import_module("finfluence.sensitivity.live"), "_CHUNK_BYTES", chunk)
    parameters = {name: _random(2, 3, seed=k).requires_grad_() for k, name in enumerate("abcd")}
    optimizer = torch.optim.AdamW([{"params": [parameters["a"], parameters["b"]]}, {"params": parameters["c"]}], lr=0.1)
    for step in range(3):
        for k, name in enumerate("ab"):
            parameters[name].grad = _random(2, 3, seed=10 * step + k)
            parameters[name].grad[0, 0] = 0.0
        optimizer.step()
    rules = from_torch(optimizer, {name: parameters[name] for name in "abc"})
    rules["d"] = ParameterRule(_Doubled(), 1)
    states = {name: optimizer.state.get(p, {}) for name, p in parameters.items()}
    queries = {name: _random(2, 3, seed=90 + k) for k, name in enumerate("dcba")}
    found = live_directions(rules, states, queries, rates=[0.1, 0.3], parameters=parameters)
    assert list(found) == list("dcba")
    for name, query in queries.items():
        rate = [0.1, 0.3][rules[name].rate_group]
        alone = live_direction(rules[name].rule, states[name], query, lr=rate, theta=parameters[name].detach())
        torch.testing.assert_close(found[name], alone, rtol=0, atol=0)
    assert found["a"][0, 0] == 0
    assert not found["c"].any()
    assert found["a"][1, 1] != 0
