"""What one micro-batch contributes to a step of the replay: per-sample signals and Hessian-vector products."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from finfluence.gradients import Direction, HookedDerivatives
from finfluence.runs.engine import Engine, random_state, set_random_state
from finfluence.runs.tasks import FunctionalModel
from finfluence.sensitivity import EXACT_LIMIT, ExactHessian, HessianMethod, Kinks, Layout, batch_hessian


class Terms(NamedTuple):
    """What `BatchTerms.evaluate` found.

    Attributes:
        values: (b, n_queries) signals.
        curvature: (n_queries, size) Hessian-vector products.
        gradient: (size,) of the micro-batch's share of the loss.
        loss: that share.
    """

    values: Tensor
    curvature: Tensor
    gradient: Tensor
    loss: float


def directions_of(layout: Layout, q: Tensor) -> list[Direction]:
    """Flat sensitivities, (n_queries, size), as one direction a query."""
    rows = {name: tensor.unbind(0) for name, tensor in layout.unflatten(q).items()}
    return [Direction({name: tensors[k] for name, tensors in rows.items()}) for k in range(len(q))]


class BatchTerms(Protocol):
    """A way to evaluate a micro-batch."""

    def evaluate(
        self, indices: np.ndarray, denominator: float, theta: Tensor, *, q: Tensor, gradient: Tensor | None = None
    ) -> Terms:
        """The terms of one micro-batch.

        Args:
            indices: (b,) rows of the dataset.
            denominator: of the sum of losses.
            theta: (size,) the parameters, where the model stands too.
            q: (n_queries, size) sensitivities.
            gradient: (size,) of the micro-batch's share of the loss, where it is known.

        Returns:
            The terms; the random state is as one forward pass leaves it.
        """
        ...


class ExactTerms:
    """By one double backward: ⟨∇L, q⟩ differentiated by the parameters is H q, by the samples' weights the signals.

    Args:
        engine: the training.
        layout: of the flat vectors.
        kinks: width over which those of activations are spread, see `finfluence.sensitivity.Kinks`.
    """

    def __init__(self, engine: Engine, layout: Layout, *, kinks: float = 0.0) -> None:
        self.engine, self.layout, self.kinks = engine, layout, kinks

    def evaluate(
        self, indices: np.ndarray, denominator: float, theta: Tensor, *, q: Tensor, gradient: Tensor | None = None
    ) -> Terms:
        """See `BatchTerms`."""
        engine, seen = self.engine, []
        weights = theta.new_full((len(indices),), 1.0 / denominator)
        # Derivatives by the weights are per unit of weight, and every sample has the same.
        weights.requires_grad_()

        def loss(_: Any) -> Tensor:
            value = (engine.losses(engine.model, indices) * weights).sum()
            seen.append(float(value.detach()))
            return value

        hessian = ExactHessian(theta, self.layout, loss, leaves=engine.parameters, weights=weights, kinks=self.kinks)
        curvature, derivatives = hessian.products(q)
        return Terms(derivatives.mT / denominator, curvature, hessian.gradient, seen[0])


class DifferenceTerms:
    """Hooks for the signals, finite differences of the gradient for the products: no second derivative is needed.

    Under bfloat16 autocast the differences are of gradients in the parameters' own precision: rounded to 8 bits they
    are noise (relative errors of about 1 on a small Llama); the two functions' curvatures differ by a few per cent.

    Args:
        engine: the training.
        layout: of the flat vectors.
        method: "one-sided" or "central".
        hooks: on the engine's model.
        kinks: width over which those of activations are spread, see `finfluence.sensitivity.Kinks`. Where there are
            any, the gradient at the point is taken once more, with smooth slopes.
    """

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        *,
        method: HessianMethod,
        hooks: HookedDerivatives,
        kinks: float = 0.0,
    ) -> None:
        self.engine, self.layout, self.hooks, self.kinks = engine, layout, hooks, kinks
        self.method: HessianMethod = method
        # A large model's gradient fills the machine by itself, and several at once would fill its memory.
        self._at_once = sum(p.numel() for p in engine.model.parameters()) <= EXACT_LIMIT
        self._precise = engine.plan.precision != "float32"

    def evaluate(
        self, indices: np.ndarray, denominator: float, theta: Tensor, *, q: Tensor, gradient: Tensor | None = None
    ) -> Terms:
        """See `BatchTerms`."""
        engine, seen = self.engine, []
        leaves = list(engine.parameters.values())
        before = random_state(engine.device)

        def loss(*, precise: bool = False) -> Tensor:
            value = engine.losses(engine.model, indices, precise=precise).sum() / denominator
            seen.append(float(value.detach()))
            return value

        def differentiated(value: Tensor) -> dict[str, Tensor]:
            found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            return dict(zip(engine.parameters, found, strict=True))

        def gradient_at(parameters: Any) -> dict[str, Tensor]:
            # Every evaluation of this micro-batch sees the dropout masks of the training.
            set_random_state(engine.device, before)
            engine.place(parameters)
            return differentiated(loss(precise=self._precise))

        def gradients(parameters: Any) -> dict[str, Tensor]:
            if self._at_once:
                try:
                    return self._stacked(parameters, indices, denominator, before=before)
                except (RuntimeError, UserWarning):
                    # An operation without a batching rule; a true error shows again in the loop.
                    self._at_once = False
            rows = range(len(next(iter(parameters.values()))))
            each = [gradient_at({name: value[row] for name, value in parameters.items()}) for row in rows]
            return {name: torch.stack([own[name] for own in each]) for name in each[0]}

        partial = gradient is not None
        with (
            self.hooks.record(directions_of(self.layout, q), len(indices), partial=partial) as recording,
            Kinks(0.0) as kinks,
        ):
            # the hooks see the backward pass of the gradient that the optimizer got
            if gradient is not None:
                self.hooks.backward(loss())
                at_theta = gradient
            else:
                # the differences of the micro-batch before have left the model elsewhere
                engine.place(self.layout.unflatten(theta))
                at_theta = self.layout.flatten(differentiated(loss()))
        after = random_state(engine.device)
        smooth = self.kinks if kinks.found else 0.0
        hessian = batch_hessian(
            self.layout.unflatten(theta),
            gradient=gradient_at,
            gradients=gradients,
            at_theta=None if self._precise or smooth else at_theta,
            kinks=smooth,
            method=self.method,
            layout=self.layout,
        )
        curvature = hessian.product(q)
        set_random_state(engine.device, after)
        return Terms(recording.values, curvature, at_theta, seen[0])

    def _stacked(self, parameters: Any, indices: np.ndarray, denominator: float, *, before: Any) -> dict[str, Tensor]:
        """Gradients at several points, (points, *shape) a parameter, by one batched forward and backward pass."""
        engine = self.engine
        set_random_state(engine.device, before)
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}

        def loss(own: dict[str, Tensor]) -> Tensor:
            model = FunctionalModel(engine.model, own)
            return engine.losses(model, indices, precise=self._precise).sum() / denominator

        # The points are independent: the gradient of the sum of their losses is every point's own.
        with warnings.catch_warnings():
            # vmap only warns where it takes an operation apart row by row, as it does with fused attention
            warnings.filterwarnings("error", message="There is a performance drop", category=UserWarning)
            total = vmap(loss, randomness="same")(leaves).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))
