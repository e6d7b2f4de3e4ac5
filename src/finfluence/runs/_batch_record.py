"""What a recorder keeps of one batch, and how it reads the caller's ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from finfluence.errors import InputError
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
