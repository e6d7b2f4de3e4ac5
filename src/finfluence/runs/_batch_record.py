"""What a recorder keeps of one batch, and how it reads the caller's ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from finfluence.errors import InputError, RecordingError
from finfluence.runs.data import tensors_of
from finfluence.signals import IdDtype


class BatchRecord:
    """What a `with recorder.batch(ids)` block yields.

    Attributes:
        loss: set it to keep the batch's loss in the run.
        loss_is: "mean" over the batch's samples; or its "share" of the step's loss, where accumulated batches add up.
    """

    def __init__(self) -> None:
        self.loss: float | Tensor | None = None
        self.loss_is: Literal["mean", "share"] = "mean"


class StepLosses:
    """The losses that a step's micro-batches were given."""

    def __init__(self) -> None:
        self._means: list[tuple[float, int]] = []
        self._shares: list[float] = []

    def add(self, record: BatchRecord, size: int) -> None:
        """Takes a micro-batch's loss, if it has one."""
        if record.loss is not None and record.loss_is == "share":
            self._shares.append(float(record.loss))
        elif record.loss is not None:
            self._means.append((float(record.loss), size))

    def mean(self) -> float | None:
        """The step's loss; None where none was given."""
        if self._shares:
            return sum(self._shares)
        count = sum(size for _, size in self._means)
        return sum(loss * size for loss, size in self._means) / count if count else None


def check_rows(expected: int, given: Any) -> None:
    """Refuses ids that are not one a row of the model's input.

    Raises:
        RecordingError: no tensor among what was `given` has `expected` entries in one of its first two dimensions.
    """
    shapes = [tuple(t.shape) for t in tensors_of(given) if t.dim()]
    if shapes and not any(expected in shape[:2] for shape in shapes):
        raise RecordingError(
            f"{expected} ids were given for a model input of shape {shapes[0]}; give one id for each of its "
            f'{shapes[0][0]} rows, or say rows="several" if a sample has several'
        )


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `optimizer.step` was given a closure; torch's step hooks see the optimizer as args[0]."""
    return any(callable(a) and not isinstance(a, torch.optim.Optimizer) for a in (*args, kwargs.get("closure")))


def as_id_array(ids: Any, id_dtype: IdDtype) -> np.ndarray:
    """(b,) array of ids of the run's type.

    Raises:
        InputError: another type, shape or length 0.
    """
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"ids must be a non-empty one-dimensional list, got shape {array.shape}")
    kind = "int64" if array.dtype.kind in "iu" else "str" if array.dtype.kind in "UO" else str(array.dtype)
    if kind != id_dtype:
        raise InputError(
            f"ids are {kind} but the run's ids are {id_dtype}; pass id_dtype={kind!r} to the Recorder"
            if kind in ("int64", "str")
            else f"ids must be integers or strings, got {array.dtype}"
        )
    return array.astype(np.int64) if id_dtype == "int64" else array
