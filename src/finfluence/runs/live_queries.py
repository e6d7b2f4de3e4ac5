"""The live sensitivities of several queries along a run: q_t = (∂U_t/∂ḡ_t)ᵀ ∇m(θ_t), refreshed every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from finfluence.errors import InputError
from finfluence.gradients import Direction, LinearFactors, query_gradient
from finfluence.sensitivity import UpdateRule, from_torch, learning_rates, live_directions, live_scale

Measure = Callable[[nn.Module], Tensor]


class LiveQueries:
    """Directions in which a batch's per-sample gradients are measured.

    Args:
        model: the model under training.
        optimizer: its torch optimizer.
        parameters: trainable parameters by name.
        measures: for each query, a function of the model that returns its scalar measurement.
        refresh: the query gradients are evaluated at every `refresh`-th step and reused between; the optimizer's
            preconditioner and learning rate are those of each step.
        update_rule: the pure update of an optimizer that finfluence does not know.

    Raises:
        InputError: no query, or a refresh interval below 1.
        RecordingError: an unknown optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        parameters: Mapping[str, nn.Parameter],
        measures: Mapping[str, Measure],
        refresh: int = 1,
        update_rule: UpdateRule | None = None,
    ) -> None:
        if not measures:
            raise InputError('queries is empty; give at least one, for example {"validation": lambda model: loss}')
        if refresh < 1:
            raise InputError(f"refresh must be at least 1, got {refresh}")
        self.model, self.optimizer, self.measures, self.refresh = model, optimizer, dict(measures), refresh
        self.rules = from_torch(optimizer, parameters, update_rule=update_rule)
        self.parameters = {name: parameters[name] for name in self.rules}
        # Factors survive only a multiplication by a number, which is what rules without a preconditioner do.
        self._scalar = all(live_scale(entry.rule, 1.0) is not None for entry in self.rules.values())
        self._gradients: list[Direction] = []

    def directions(self, step: int) -> list[Direction]:
        """The sensitivities of every query at a step that is about to begin.

        Args:
            step: index of the step; gradients are refreshed where it is a multiple of the interval.

        Returns:
            One direction a query, in the queries' order; units: measurement per unit of gradient.
        """
        if step % self.refresh == 0 or not self._gradients:
            self._gradients = [
                query_gradient(self.model, self.parameters, measure, factors=self._scalar)
                for measure in self.measures.values()
            ]
        rates = learning_rates(self.optimizer)
        return [self._sensitivity(gradient, rates) for gradient in self._gradients]

    def _sensitivity(self, gradient: Direction, rates: tuple[float, ...]) -> Direction:
        if self._scalar:
            scales = {name: self._scale(name, rates) for name in gradient.tensors}
            if len(set(scales.values())) == 1:
                return gradient.scaled(next(iter(scales.values())))
            return Direction(
                {name: tensor * scales[name] for name, tensor in gradient.tensors.items()},
                factors={
                    module: LinearFactors(f.x, f.delta, f.scale * scales[f"{module}.weight" if module else "weight"])
                    for module, f in gradient.factors.items()
                },
            )
        states = {name: self.optimizer.state.get(self.parameters[name], {}) for name in gradient.tensors}
        return Direction(live_directions(self.rules, states, gradient.tensors, rates=rates, parameters=self.parameters))

    def _scale(self, name: str, rates: tuple[float, ...]) -> float:
        entry = self.rules[name]
        started = self.optimizer.state.get(self.parameters[name], {}).get("momentum_buffer") is not None
        scale = live_scale(entry.rule, rates[entry.rate_group], step=int(started))
        assert scale is not None
        return scale
