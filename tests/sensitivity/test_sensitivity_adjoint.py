"""The vjp of an update against automatic differentiation and brute force.

Protects: one wrong factor here scales every score.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from finfluence.errors import FinfluenceWarning, InputError, ReplayError
from finfluence.sensitivity import (
    SGD,
    Adam,
    AdamRule,
    AdamW,
    AdjointMonitor,
    AdjointOptions,
    FlatUpdate,
    Layout,
    ParameterRule,
    SGDRule,
    clip_factor,
    clip_vjp,
    generic_vjp,
    vjp,
)

RULES = [
    SGD(lr=0.1, weight_decay=0.05).rule,
    SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05).rule,
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05).rule,
    Adam(weight_decay=0.1, betas=(0.8, 0.95)).rule,
    AdamW(weight_decay=0.2).rule,
]
OPTIONS = [
    AdjointOptions(damping=0.0, second_moment="constant"),
    AdjointOptions(damping=0.2, second_moment="constant"),
    AdjointOptions(damping=0.1),
    AdjointOptions(damping=0.0, second_moment="exact"),
    AdjointOptions(damping=0.1, second_moment="exact"),
]
LAYOUT = Layout(("w", "b"), ((3, 2), (4,)))
EXACT = AdjointOptions(damping=0.0, second_moment="exact")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _point(rule, step: int):
    """A state that the rule itself reached after `step` updates, and the next gradient (with an exact zero in it)."""
    theta = _random(10, seed=3)
    state = rule.init(theta)
    for earlier in range(step):
        theta, state = rule.update(theta, state, _random(10, seed=10 + earlier), lr=0.1, step=earlier)
    gradient = _random(10, seed=4)
    gradient[3] = 0.0
    return theta, state, gradient


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_closed_form_equals_automatic_differentiation(rule, options, step):
    """Two queries on a leading axis, together and one by one."""
    theta, state, gradient = _point(rule, step)
    lambda_theta = _random(2, 10, seed=5)
    lambda_state = {key: _random(2, 10, seed=6 + index) for index, key in enumerate(state)}
    if options.second_moment == "constant":
        lambda_state.pop("exp_avg_sq", None)
    arguments: dict[str, Any] = {"lr": 0.07, "step": step, "options": options, "layout": LAYOUT}
    if options.second_moment == "settled" and hasattr(rule, "settled"):
        arguments["settled"] = rule.settled({"exp_avg_sq": _random(10, seed=9).square()}, 40)
    fast = vjp(rule, theta, state, gradient, lambda_theta, lambda_state, **arguments)
    slow = generic_vjp(rule, theta, state, gradient, lambda_theta, lambda_state, **arguments)
    torch.testing.assert_close(fast.theta, slow.theta, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(fast.q, slow.q, rtol=1e-11, atol=1e-13)
    for key, value in fast.state.items():
        torch.testing.assert_close(value, slow.state[key], rtol=1e-11, atol=1e-13)
    for query in range(2):
        own = {key: value[query] for key, value in lambda_state.items()}
        single = vjp(rule, theta, state, gradient, lambda_theta[query], own, **arguments)
        torch.testing.assert_close(single.q, fast.q[query], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(single.theta, fast.theta[query], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_overwriting_the_cotangents_changes_nothing_else(rule, options):
    """The results are the same, and what the update was evaluated at stays as it is."""
    point = _point(rule, 3)
    lambda_theta = _random(2, 10, seed=5)
    lambda_state = {key: _random(2, 10, seed=6 + index) for index, key in enumerate(point[1])}
    arguments: dict[str, Any] = {"lr": 0.07, "step": 3, "options": options, "layout": LAYOUT}
    expected = vjp(rule, *point, lambda_theta, lambda_state, **arguments)
    own = {key: value.clone() for key, value in lambda_state.items()}
    found = vjp(rule, *point, lambda_theta.clone(), own, overwrite=True, **arguments)
    torch.testing.assert_close((found.theta, found.state, found.q), (expected.theta, expected.state, expected.q))
    torch.testing.assert_close(point, _point(rule, 3), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_composed_steps_equal_brute_force(rule):
    """Four composed updates from step 2 with fixed gradients: d⟨a, theta_T⟩ to each of them, theta and state.

    Central differences with steps of 1e-5 in float64: error about 1e-10 of curvature plus 1e-11 of rounding.
    """
    count, first = 4, 2
    theta0, state0, _ = _point(rule, first)
    gradients = [_random(10, seed=30 + index) for index in range(count)]
    a = _random(10, seed=8)

    def run(theta, state, gradients):
        trajectory = []
        for index, gradient in enumerate(gradients):
            trajectory.append((theta, state))
            theta, state = rule.update(theta, state, gradient, lr=0.05 + 0.01 * index, step=first + index)
        return a @ theta, trajectory

    _, trajectory = run(theta0, state0, gradients)
    lambda_theta, lambda_state, sensitivities = a, {}, {}
    for index in reversed(range(count)):
        theta, state = trajectory[index]
        lambda_theta, lambda_state, sensitivities[index] = vjp(
            rule,
            theta,
            state,
            gradients[index],
            lambda_theta,
            lambda_state,
            lr=0.05 + 0.01 * index,
            step=first + index,
            options=EXACT,
        )

    def difference(perturb):
        direction = _random(10, seed=9) * 1e-5
        return (run(*perturb(direction))[0] - run(*perturb(-direction))[0]) / 2e-5

    unit = _random(10, seed=9)
    for index in range(count):

        def on_gradient(direction, index=index):
            return theta0, state0, [g + direction * (i == index) for i, g in enumerate(gradients)]

        torch.testing.assert_close(sensitivities[index] @ unit, difference(on_gradient), rtol=1e-7, atol=1e-10)
    on_theta = difference(lambda direction: (theta0 + direction, state0, gradients))
    torch.testing.assert_close(lambda_theta @ unit, on_theta, rtol=1e-7, atol=1e-10)
    for key in state0:
        # Relative perturbations: a second moment may be far smaller than the step, and must stay positive.
        size = state0[key].abs()
        on_state = difference(
            lambda direction, key=key, size=size: (theta0, {**state0, key: state0[key] + size * direction}, gradients)
        )
        torch.testing.assert_close(lambda_state[key] @ (size * unit), on_state, rtol=1e-7, atol=1e-10)


def test_constant_second_moment_equals_brute_force_with_frozen_v():
    """The same check with v (and the damping) taken as given numbers, κ = 0.2, two tensors."""
    rule = AdamW(weight_decay=0.2, betas=(0.8, 0.95)).rule
    options = AdjointOptions(damping=0.2, second_moment="constant")
    theta, state, gradient = _point(rule, 3)
    a, c1, c2 = _random(10, seed=8), 1 - 0.8**4, 1 - 0.95**4
    v_hat = (0.95 * state["exp_avg_sq"] + 0.05 * gradient**2) / c2
    rms = torch.cat([v_hat[:6].mean().sqrt().expand(6), v_hat[6:].mean().sqrt().expand(4)])
    denominator = v_hat.sqrt() + 1e-8 + 0.2 * rms

    def frozen(gradient):
        first = 0.8 * state["exp_avg"] + 0.2 * gradient
        return a @ (theta * (1 - 0.1 * 0.2) - 0.1 * first / c1 / denominator)

    back = vjp(rule, theta, state, gradient, a, {}, lr=0.1, step=3, options=options, layout=LAYOUT)
    for index in range(10):
        unit = torch.zeros(10, dtype=torch.float64)
        unit[index] = 1e-3
        expected = (frozen(gradient + unit) - frozen(gradient - unit)) / 2e-3
        torch.testing.assert_close(back.q[index], expected, rtol=1e-10, atol=1e-12)


def test_a_settled_second_moment_bounds_what_few_batches_have_seen():
    """Third step: a feature that no batch has had, v_hat = 0 now and 4 at the end, beside one whose moment falls."""
    rule = AdamW(betas=(0.8, 0.95), weight_decay=0.0).rule
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    early = {"exp_avg": zeros, "exp_avg_sq": torch.tensor([0.0, 9.0 * (1 - 0.95**3)], dtype=torch.float64) / 0.95}
    end = {"exp_avg": zeros, "exp_avg_sq": torch.tensor([4.0, 1.0], dtype=torch.float64) * (1 - 0.95**50)}
    settled = rule.settled(end, 50)
    torch.testing.assert_close(settled, torch.tensor([4.0, 1.0], dtype=torch.float64))
    batches = (1 - 0.95**3) / 0.05
    for known, expected in ((None, [0.0, 1 / 3]), (settled, [math.sqrt((batches + 1) / 4), 1 / 3])):
        options = AdjointOptions(damping=0.0)
        back = vjp(rule, ones, early, zeros, ones, {}, lr=1.0, step=2, options=options, settled=known)
        found = -back.q * (1 - 0.8**3) / (1 - 0.8)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_damping_bounds_the_sensitivity_of_a_nearly_dead_unit():
    """v_hat = 1e-16 beside v_hat = 1: undamped 1/(1e-8 + eps), damped about 1/(κ·rms); never-updated tensors give 0."""
    rule = AdamRule()
    theta = torch.zeros(2, dtype=torch.float64)
    state = {"exp_avg": theta, "exp_avg_sq": torch.tensor([1e-16, 1.0], dtype=torch.float64)}
    ones, arguments = torch.ones(2, dtype=torch.float64), {"lr": 1.0, "step": 10_000}
    free = vjp(rule, theta, state, theta, ones, {}, options=AdjointOptions(damping=0.0), **arguments).q
    damped = vjp(rule, theta, state, theta, ones, {}, options=AdjointOptions(damping=0.2), **arguments).q
    assert free[0].abs() > 1e6
    assert damped[0].abs() < 0.1 / (0.2 * math.sqrt(0.5)) * 1.01
    never = {"exp_avg": theta, "exp_avg_sq": theta}
    assert not vjp(rule, theta, never, theta, ones, {}, **arguments).q.any()


@dataclass  # not frozen: a user's rule need not be hashable
class _ClippedSign:
    """A user's own rule, elementwise, without any optional method: theta − lr·tanh(g)."""

    def init(self, theta):
        return {}

    def update(self, theta, state, grad, *, lr, step):
        return theta - lr * torch.tanh(grad), {}


def test_flat_update_with_a_users_rule_beside_a_known_one():
    parameters = {"a": _random(3, 2, seed=1), "b": _random(4, seed=2)}
    own = {"a": ParameterRule(_ClippedSign(), 0), "b": ParameterRule(SGDRule(momentum=0.9), 1)}
    update = FlatUpdate(parameters, own)
    theta, gradient = update.layout.flatten(parameters), _random(10, seed=4)
    state = update.init(theta)
    lambda_theta = _random(5, 10, seed=5)
    to_theta, to_state, q = update.vjp(theta, state, gradient, lambda_theta, None, lr=(0.1, 0.2), step=3)
    expected = torch.cat(
        [-0.1 * (1 - torch.tanh(gradient[:6]) ** 2).expand(5, 6), torch.full((5, 4), -0.2, dtype=torch.float64)], dim=-1
    )
    torch.testing.assert_close(q, expected * lambda_theta, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(to_theta, lambda_theta)
    torch.testing.assert_close(to_state[1]["momentum_buffer"], -0.2 * 0.9 * lambda_theta[:, 6:])


def test_monitor_records_norms_warns_of_growth_and_stops_divergence():
    monitor = AdjointMonitor(queries=["validation", "poison"])
    adjoint = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert monitor.check(9, adjoint) == (5.0, 0.0)
    assert monitor.check(8, adjoint * 4 + torch.tensor([[0.0], [1.0]]))[1] == pytest.approx(math.sqrt(2))
    with pytest.warns(FinfluenceWarning, match=r"'validation' has norm 30 at step 7, 5 where .* raise damping"):
        monitor.check(7, adjoint * 6)
    monitor.check(6, adjoint * 7)  # warned once: a second warning would be an error here
    with pytest.raises(ReplayError, match=r"'validation' has norm 155 at step 5, 5 where .* diverges; raise damping"):
        monitor.check(5, adjoint * 31)
    assert [step for step, _ in monitor.norms] == [9, 8, 7, 6, 5]
    with pytest.raises(ReplayError, match=r"'poison' has norm nan at step 4"):
        monitor.check(4, torch.tensor([[1.0, 1.0], [float("nan"), 0.0]]))
    with pytest.raises(ReplayError, match="query 0 has norm inf at step 3"):
        AdjointMonitor(factor=math.inf).check(3, torch.tensor([float("inf")]))


def test_monitor_names_those_that_diverge_and_goes_on_where_a_sweep_stopped():
    """The sweep is linear: growth, not size, decides, so a scaled copy of a query is judged the same."""
    monitor = AdjointMonitor(queries=["a", "b", "c"], caution=math.inf, first=(1.0, 1e-9, 1.0))
    norms, diverged = monitor.watch(9, torch.tensor([[29.0], [29e-9], [31.0]]))
    assert norms[0] == 29.0
    assert list(diverged) == [2]
    assert "'c' has norm 31 at step 9, 1 where the sweep began: it diverges" in diverged[2]
    assert list(monitor.watch(8, torch.tensor([[31.0], [31e-9], [0.0]]))[1]) == [0, 1]


def test_bad_options_name_the_value():
    with pytest.raises(InputError, match=r"damping is -0\.1"):
        AdjointOptions(damping=-0.1)
    with pytest.raises(InputError, match="'frozen'"):
        AdjointOptions(second_moment="frozen")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"factor is 1\.0"):
        AdjointMonitor(factor=1.0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_clip_equals_torch_and_its_derivative_brute_force(scale):
    """scale 0.01 leaves the clip inactive. Central differences of 1e-5·scale in float64."""
    gradient, q = _random(12, seed=1) * scale, _random(3, 12, seed=2)
    norm = float(gradient.norm())
    factor = clip_factor(norm, 1.0)
    parameter = torch.zeros(12, dtype=torch.float64).requires_grad_()
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-12, atol=0.0)

    def clipped(gradient):
        return gradient * clip_factor(float(gradient.norm()), 1.0)

    columns = []
    for index in range(12):
        unit = torch.zeros(12, dtype=torch.float64)
        unit[index] = 1e-5 * scale
        columns.append((clipped(gradient + unit) - clipped(gradient - unit)) / (2e-5 * scale))
    jacobian = torch.stack(columns, dim=1)
    exact = clip_vjp(q, gradient, factor=factor, derivative="exact")
    torch.testing.assert_close(exact, q @ jacobian, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(clip_vjp(q[0], gradient, factor=factor, derivative="exact"), exact[0])
    # The recorded factor as a constant: signals sum to <q, gradient as the optimizer saw it>.
    constant = clip_vjp(q, gradient, factor=factor)
    torch.testing.assert_close(constant @ gradient, q @ (gradient * factor))


def test_clip_refuses_nonsense():
    with pytest.raises(InputError, match="max_norm is 0"):
        clip_factor(1.0, 0)
    with pytest.raises(InputError, match="'tangent'"):
        clip_vjp(torch.ones(2), torch.ones(2), factor=0.5, derivative="tangent")  # pyright: ignore[reportArgumentType]


def test_gradients_that_join_the_adjoint_are_part_of_what_growth_is_measured_against():
    monitor = AdjointMonitor(factor=30.0, caution=29.0, first=[1.0, 1.0])
    monitor.joined(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    assert monitor.reference == pytest.approx([5.0, 1.0])
    _, diverged = monitor.watch(3, torch.tensor([[100.0, 0.0], [40.0, 0.0]]))
    assert list(diverged) == [1]
