"""Validation of the arguments that every module of this floor shares."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finfluence.errors import InputError

MINIMUM_RUNS = 3


def probability(name: str, value: float) -> float:
    """Return `value` as a float strictly between 0 and 1, or raise `InputError`."""
    number = finite(name, value)
    if not 0.0 < number < 1.0:
        raise InputError(f"{name} is {number:g}; give a number strictly between 0 and 1.")
    return number


def finite(name: str, value: float) -> float:
    """Return `value` as a finite float, or raise `InputError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; give one finite number.") from None
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}; give one finite number.")
    return number


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`, or raise `InputError`."""
    options = list(allowed)
    if value not in options:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(options)}.")
    return value


def measurements(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return measurements as finite float64 `(..., runs)` with at least three runs, or raise `InputError`."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} is not an array of numbers; give one measurement a training run.") from None
    if array.ndim == 0 or array.shape[-1] < MINIMUM_RUNS:
        runs = 1 if array.ndim == 0 else array.shape[-1]
        raise InputError(
            f"{name} holds {runs} value(s); give at least {MINIMUM_RUNS} training runs (16 or more are useful)."
        )
    if not np.isfinite(array).all():
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise InputError(f"{name} holds {bad} NaN or infinite value(s) of {array.size}; drop the runs that diverged.")
    return array


def sample(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return one sample of measurements `(runs,)`, checked as `measurements` does."""
    array = measurements(name, values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}; give one dimension, one value a training run.")
    return array
