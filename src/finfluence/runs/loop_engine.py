"""A loop of somebody else's, taken again step by step from what was recorded of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from finfluence.errors import InputError, ReplayError
from finfluence.runs.data import Collate
from finfluence.runs.engine import Engine, Part, set_random_state
from finfluence.runs.loop_record import LoopStep, build_optimizer, read_steps
from finfluence.runs.plan import Plan
from finfluence.runs.sampling import Batch
from finfluence.runs.tasks import Task
from finfluence.sensitivity import ParameterRule, from_torch
from finfluence.signals import Folder


class LoopEngine(Engine):
    """An engine whose batches, learning rates and random numbers are those of a recorded loop.

    The steps of one stretch between stored states are in memory at a time.

    Args:
        task: the losses of the loop: their sum over a micro-batch, divided by what was recorded, is what the loop
            differentiated.
        model: as at recording.
        dataset: whose rows the recorded ones are.
        folder: the run directory.
        manifest: the entries of run.json.
        cuts: steps before which states are stored.
        collate: makes a batch of a list of samples.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        *,
        dataset: Any,
        folder: Folder,
        manifest: Mapping[str, Any],
        cuts: Sequence[int],
        collate: Collate | None = None,
    ) -> None:
        super().__init__(task, model, dataset=dataset, plan=Plan.from_dict(manifest["plan"]), collate=collate)
        self.optimizer = build_optimizer(manifest["loop"], self.parameters)
        self.total_steps = int(manifest["total_steps"])
        self._folder, self._cuts = folder, list(cuts)
        self._epochs = [int(e) for e in manifest["loop"]["epochs"]]
        self._rules = from_torch(self.optimizer, self.parameters)
        self._first, self._steps = 0, list[LoopStep]()

    @property
    def rules(self) -> Mapping[str, ParameterRule]:
        """Each parameter's update rule."""
        return self._rules

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the longest epoch."""
        return max(self._epochs)

    def measured_steps(self, epochs: Sequence[float]) -> tuple[int, ...]:
        """The steps after which the run is measured; the last is its end, wherever in its epoch that is.

        Raises:
            InputError: two of them are the same step, or one is before the first step.
        """
        ends = np.concatenate([[0], np.cumsum(self._epochs)])
        steps = tuple(round(step) for step in np.interp(epochs, np.arange(len(ends)), ends))
        if len(set(steps)) < len(steps) or min(steps) < 1:
            asked = ", ".join(f"{epoch:g}" for epoch in epochs)
            raise InputError(f"the epochs have {self._epochs} steps, too few to measure after {asked}; give fewer")
        return steps

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The loop's steps from `start`, before which a state is stored, on."""
        for step in range(start, self.total_steps):
            found = self._step(step)
            rows = np.concatenate([part.rows for part in found.parts])
            share = sum(len(part.rows) / part.denominator for part in found.parts)
            yield Batch(step, found.epoch, found.position, rows, len(rows) / share)

    def micro_batches(self, batch: Batch) -> list[Part]:
        """The micro-batches of a step, as they were."""
        return [Part(part.rows, part.denominator) for part in self._step(batch.step).parts]

    def seed(self, step: int, part: int = 0) -> None:
        """Puts torch's generators where the loop had them, if it drew from them."""
        state = self._step(step).parts[part].random
        if state is not None:
            set_random_state(self.device, state)

    def rates(self, step: int) -> tuple[float, ...]:
        """The learning rate of each param group."""
        return self._step(step).rates

    def learning_rate(self, step: int) -> float:
        """The first param group's."""
        return self.rates(step)[0]

    def set_learning_rate(self, step: int) -> None:
        """Gives the optimizer the learning rates of a step."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            group["lr"] = rate

    def _step(self, step: int) -> LoopStep:
        if not self._first <= step < self._first + len(self._steps):
            end = next(cut for cut in self._cuts if cut > step)
            self._steps = read_steps(self._folder, end)
            self._first = end - len(self._steps)
            if any(part.rows.max() >= self.n for s in self._steps for part in s.parts):
                raise ReplayError(f"the loop saw rows that the dataset of {self.n} samples has not; give its dataset")
        return self._steps[step - self._first]
