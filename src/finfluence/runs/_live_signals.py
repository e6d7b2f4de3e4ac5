"""The live signals of a loop's steps: sensitivities, hooks, and whether what they read is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finfluence.gradients import Direction, HookedDerivatives
from finfluence.runs._identity import identity_residual
from finfluence.runs._step_checks import StepChecks
from finfluence.runs.live_queries import LiveQueries
from finfluence.sensitivity import learning_rates


class LiveSignals:
    """Reads the signals of one step after the other.

    Args:
        model: under training.
        queries: what is measured.
        batch_dim: which dimension of activations counts samples.

    Attributes:
        checks: what was suspect so far.
        directions: sensitivities of the step, one a query.
        last: (b, n_queries) float64 signals of the last step.
    """

    def __init__(self, model: nn.Module, queries: LiveQueries, *, batch_dim: Any) -> None:
        self.queries, self._hooks = queries, HookedDerivatives(model, queries.parameters, batch_dim=batch_dim)
        self.checks = StepChecks(queries.parameters, self._hooks)
        self.directions: list[Direction] = []
        self.last: np.ndarray | None = None
        self._rates: tuple[float, ...] = ()
        self._values: list[Tensor] = []

    @property
    def low_precision(self) -> bool:
        """Whether a gradient of 16 bits was seen."""
        return self._hooks.low_precision

    def begin(self, step: int) -> list[Direction]:
        """Fixes the sensitivities of a step."""
        self.directions = self.queries.directions(step)
        self._rates = learning_rates(self.queries.optimizer)
        self._values = []
        return self.directions

    @contextlib.contextmanager
    def record(self, size: int, *, segments: Any) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch of `size` samples."""
        with self._hooks.record(self.directions, size, segments=segments) as recording:
            yield
        self._values.append(recording.values)

    def of_step(self, names: np.ndarray, *, scale: float, step: int) -> tuple[np.ndarray, float]:
        """What the step's micro-batches gave.

        Args:
            names: (b,) ids of its samples.
            scale: what the gradient was multiplied by since.
            step: its index, for messages.

        Returns:
            (b, n_queries) float64 signals, and the relative residual of the signal identity.

        Raises:
            RecordingError: a signal is not finite.
        """
        values = torch.cat(self._values).double() * scale
        residual = identity_residual(values, self.directions, self.queries.parameters)
        self.last = values.cpu().numpy()
        self.checks.finite(self.last, names, step=step)
        self.checks.rates(self._rates, learning_rates(self.queries.optimizer), step=step)
        self.checks.residual(residual, step=step)
        return self.last, residual

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._hooks.remove()
