"""The whole reverse recursion against brute force.

Protects: calibration, i.e. that q_t is the derivative of the whole run.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from finfluence.sensitivity import (
    SGD,
    Adam,
    AdamW,
    AdjointOptions,
    FlatUpdate,
    batch_hessian,
    clip_factor,
    clip_vjp,
    gradient_of,
)

STEPS, BATCH = 8, 6
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

OPTIMIZERS = [
    SGD(lr=0.5, weight_decay=0.02),
    SGD(lr=0.3, momentum=0.9, dampening=0.2, weight_decay=0.02),
    SGD(lr=0.3, momentum=0.9, nesterov=True),
    Adam(lr=0.05, weight_decay=0.1),
    AdamW(lr=0.05, weight_decay=0.1, betas=(0.8, 0.95)),
]


class _Problem:
    """A tanh MLP on random data (seed 0), two measurements, a rate that changes every step."""

    def __init__(self, configuration, max_norm: float | None = None) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        parameters = {name: 0.5 * normal(*value.shape) for name, value in MODEL.named_parameters()}
        self.x, self.y = normal(STEPS, BATCH, 4), torch.randint(0, 3, (STEPS, BATCH), generator=generator)
        self.query_x, self.query_y = normal(2, 4), torch.tensor([0, 2])
        self.update = FlatUpdate(parameters, configuration.rule)
        self.layout = self.update.layout
        self.start = self.layout.flatten(parameters)
        self.delta = normal(STEPS, self.layout.size)
        self.lr, self.max_norm = configuration.lr, max_norm

    def rate(self, step: int) -> float:
        return self.lr * (1.0 - 0.5 * step / STEPS)

    def loss(self, step: int):
        return lambda parameters: nn.functional.cross_entropy(
            functional_call(MODEL, dict(parameters), (self.x[step],)), self.y[step]
        )

    def measures(self, theta: Tensor) -> Tensor:
        logits = functional_call(MODEL, self.layout.unflatten(theta), (self.query_x,))
        return nn.functional.cross_entropy(logits, self.query_y, reduction="none")

    def gradient(self, step: int, theta: Tensor) -> Tensor:
        return self.layout.flatten(gradient_of(self.loss(step))(self.layout.unflatten(theta)))

    def clip(self, gradient: Tensor) -> float:
        return 1.0 if self.max_norm is None else clip_factor(float(gradient.norm()), self.max_norm)

    def run(self, perturbed: int | None = None, size: float = 0.0):
        """Train; at step `perturbed` the batch's gradient (before clipping) is moved by size·delta."""
        theta, state, trajectory = self.start, self.update.init(self.start), []
        for step in range(STEPS):
            gradient = self.gradient(step, theta)
            if step == perturbed:
                gradient = gradient + size * self.delta[step]
            factor = self.clip(gradient)
            trajectory.append((theta, state, gradient, factor))
            theta, state = self.update.update(theta, state, gradient * factor, lr=self.rate(step), step=step)
        return theta, trajectory

    def sensitivities(self, options: AdjointOptions, method="exact", clip="exact") -> Tensor:
        """(STEPS, 2, size) dm_k(theta_T) to the batch gradient of each step, by the reverse recursion."""
        theta, trajectory = self.run()
        adjoint = torch.func.jacrev(self.measures)(theta)
        adjoint_state, result = None, []
        for step in reversed(range(STEPS)):
            theta, state, gradient, factor = trajectory[step]
            back, adjoint_state, q = self.update.vjp(
                theta,
                state,
                gradient * factor,
                adjoint,
                adjoint_state,
                lr=self.rate(step),
                step=step,
                options=options,
            )
            q = clip_vjp(q, gradient, factor=factor, derivative=clip)
            hessian = batch_hessian(
                self.layout.unflatten(theta), loss=self.loss(step), method=method, layout=self.layout
            )
            torch.testing.assert_close(hessian.gradient, gradient)
            adjoint = back + hessian.product(q)
            result.append(q)
        return torch.stack(result[::-1])

    def brute_force(self, step: int, size: float) -> Tensor:
        """(2,) derivative of measurements along delta at a step: extrapolated central differences of whole runs."""

        def central(size: float) -> Tensor:
            return (self.measures(self.run(step, size)[0]) - self.measures(self.run(step, -size)[0])) / (2 * size)

        return (4 * central(size / 2) - central(size)) / 3


EXACT = AdjointOptions(damping=0.0, second_moment="exact")


@pytest.mark.parametrize("max_norm", [None, 0.3], ids=["free", "clipped"])
@pytest.mark.parametrize("configuration", OPTIMIZERS, ids=repr)
def test_the_recursion_is_the_derivative_of_the_run(configuration, max_norm):
    """Central differences of size 1e-4, extrapolated, against a tolerance of 1e-6 of ‖q‖‖delta‖.

    Adam is perturbed from step 1 on: its first step is a sign of each element, with jumps wherever g is near 0.
    """
    problem = _Problem(configuration, max_norm)
    if max_norm is not None:
        factors = [factor for *_, factor in problem.run()[1]]
        assert min(factors) < 1.0
    sensitivities = problem.sensitivities(EXACT)
    predicted = (sensitivities * problem.delta[:, None]).sum(-1)
    first = 0 if isinstance(configuration, SGD) else 1
    for step in range(first, STEPS):
        actual = problem.brute_force(step, 1e-4)
        scale = problem.delta[step].norm() * sensitivities[step].norm(dim=-1)
        assert ((predicted[step] - actual).abs() / scale).max() < 1e-6


@pytest.mark.parametrize(("method", "tolerance"), [("one-sided", 1e-4), ("central", 1e-6)])
def test_difference_products_reproduce_the_exact_recursion(method, tolerance):
    for configuration in (OPTIMIZERS[1], OPTIMIZERS[4]):
        problem = _Problem(configuration)
        options = AdjointOptions()
        exact, approximate = problem.sensitivities(options), problem.sensitivities(options, method)
        assert ((approximate - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < tolerance


def test_a_constant_second_moment_is_the_derivative_with_v_frozen_and_damped():
    """The linearisation that `second_moment="constant"` stands for, written out.

    Perturbed runs in which every step's damped denominator stays at its recorded value, and whose deviation from the
    recorded run passes through those denominators.
    """
    beta, decay, damping = 0.8, 0.1, 0.2
    problem = _Problem(AdamW(lr=0.05, weight_decay=decay, betas=(beta, 0.95)))
    options = AdjointOptions(damping=damping, second_moment="constant")
    end, trajectory = problem.run()
    points = [theta for theta, *_ in trajectory] + [end]

    def denominator(step: int) -> Tensor:
        _, (state,), gradient, _ = trajectory[step]
        v_hat = (0.95 * state["exp_avg_sq"] + 0.05 * gradient**2) / (1 - 0.95 ** (step + 1))
        named = problem.layout.unflatten(v_hat)
        rms = {name: value.mean().sqrt().expand_as(value) for name, value in named.items()}
        return v_hat.sqrt() + 1e-8 + damping * problem.layout.flatten(rms)

    denominators = [denominator(step) for step in range(STEPS)]

    def frozen(perturbed: int, size: float) -> Tensor:
        off, moment = torch.zeros_like(problem.start), torch.zeros_like(problem.start)
        for step in range(STEPS):
            moved = problem.gradient(step, points[step] + off) - trajectory[step][2]
            if step == perturbed:
                moved = moved + size * problem.delta[step]
            moment = beta * moment + (1 - beta) * moved
            rate = problem.rate(step)
            off = (1 - rate * decay) * off - rate / (1 - beta ** (step + 1)) * moment / denominators[step]
        return problem.measures(end + off)

    sensitivities = problem.sensitivities(options)
    for step in range(STEPS):
        actual = (frozen(step, 1e-6) - frozen(step, -1e-6)) / 2e-6
        predicted = (sensitivities[step] * problem.delta[step]).sum(-1)
        scale = problem.delta[step].norm() * sensitivities[step].norm(dim=-1)
        assert ((predicted - actual).abs() / scale).max() < 1e-6
