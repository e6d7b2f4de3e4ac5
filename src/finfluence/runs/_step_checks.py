"""What a recorder finds suspect in a step, each said once."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import polars as pl
from torch import nn

from finfluence.errors import FinfluenceWarning, RecordingError, StoreError
from finfluence.gradients import HookedDerivatives
from finfluence.runs._identity import tolerance
from finfluence.signals import Folder, SignalStore, check_same, holds_run, read_manifest


def check_resumed(folder: Folder, *, step: int, stored: Collection[int] | None, sensitivity: str) -> None:
    """Refuses to go on with a run at a step that it has not reached, or as another kind of recording.

    Args:
        folder: the run directory; without a run there is nothing to refuse.
        step: at which it is resumed.
        stored: steps before which the run keeps a state; None where only live signals are recorded.
        sensitivity: "live", "replay" or "both".

    Raises:
        StoreError: it cannot be gone on with.
    """
    if not holds_run(folder):
        return
    check_same(folder, read_manifest(folder), sensitivity=sensitivity)
    last = SignalStore.open(folder.display, partial=True).steps().select(pl.col("step").max()).collect().item()
    last = -1 if last is None else last
    if last + 1 < step:
        raise StoreError(
            f"{folder.display} was recorded up to step {last} and training resumes at step {step}; "
            "resume from a checkpoint at or before its end"
        )
    if stored is not None and step and step not in stored:
        raise StoreError(
            f"{folder.display} has no state from before step {step}, at which the loop resumes; call "
            "recorder.flush() beside every checkpoint of the training"
        )


class StepChecks:
    """Looks at every recorded step.

    Args:
        parameters: trainable parameters by name.
        hooks: that read the signals.

    Attributes:
        largest_residual: of the signal identity so far.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], hooks: HookedDerivatives) -> None:
        self._parameters, self._hooks = parameters, hooks
        self._warned: set[str] = set()
        self.largest_residual = 0.0

    def finite(self, signals: np.ndarray, names: np.ndarray, *, step: int) -> None:
        """Refuses signals, (b, n_queries), that are not numbers.

        Raises:
            RecordingError: one is not finite.
        """
        if np.isfinite(signals).all():
            return
        row = int(np.flatnonzero(~np.isfinite(signals).all(axis=1))[0])
        raise RecordingError(
            f"the signal of sample {names[row].item()!r} at step {step} is {signals[row].min()}; the loss or "
            "the query is not finite: lower the learning rate, clip the gradient, or use GradScaler.step, which "
            "skips such steps"
        )

    def residual(self, residual: float, *, step: int) -> None:
        """Warns where the signals miss a part of the gradient."""
        self.largest_residual = max(self.largest_residual, residual)
        limit = tolerance(self._parameters, low_precision=self._hooks.low_precision)
        if residual <= limit:
            return
        uncovered = self._hooks.uncovered()
        cause = (
            f"parameter {uncovered[0]!r} is used outside its module, where hooks do not see it"
            if uncovered
            else "the gradient was changed by something other than one factor (clipping by value, per-group clipping, "
            "a regulariser in the loss, noise), or the precision is too low"
        )
        self._warn_once(
            "residual",
            f"the signal identity is off by {residual:.1e} at step {step} (limit {limit:.0e}): {cause}; "
            "the signals miss that part of the gradient",
        )

    def rates(self, before: Sequence[float], now: Sequence[float], *, step: int) -> None:
        """Warns where the learning rate is another than when the step's sensitivities were fixed."""
        if tuple(now) != tuple(before):
            self._warn_once(
                "rates",
                f"the learning rate of step {step} changed from {before[0]:g} to {now[0]:g} after its "
                "batch began; set it before `recorder.batch`, because the step's sensitivity depends on it",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FinfluenceWarning, stacklevel=7)  # out of our frames and torch's step
