"""Checks and small array operations that every module of this floor shares."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finfluence.errors import InputError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


def integers(values: ArrayLike, name: str) -> Ints:
    """Return a flat int64 array, refusing anything that is not whole numbers."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}; pass a flat array")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}; pass integers")
    return array.astype(np.int64, copy=False)


def signals(step: ArrayLike, code: ArrayLike, value: ArrayLike, *, n_samples: int) -> tuple[Ints, Ints, Floats]:
    """Check one query's flat signals and return them as (int64, int64, float64) arrays of one length.

    Args:
        step: (n_signals,) integers.
        code: (n_signals,) sample codes, 0 to n_samples − 1.
        value: (n_signals,) the signals, units of the measurement.
        n_samples: size of the training set.

    Raises:
        InputError: lengths differ, no signals, a code out of range, or a value that is not finite.
    """
    steps, codes = integers(step, "step"), integers(code, "code")
    values = np.asarray(value, dtype=np.float64)
    if not len(steps) == len(codes) == values.size or values.ndim != 1:
        raise InputError(
            f"step, code and value have lengths {len(steps)}, {len(codes)}, {values.size}; they must agree"
        )
    if not len(steps):
        raise InputError("there are no signals; record at least one step")
    check_codes(codes, n_samples)
    check_finite(values, steps, codes, "step")
    return steps, codes, values


def check_codes(codes: Ints, n_samples: int) -> None:
    """Refuse sample codes outside 0 … n_samples − 1."""
    if n_samples < 2:
        raise InputError(f"n_samples is {n_samples}; influence needs at least two samples")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= n_samples:
        raise InputError(
            f"sample code {low if low < 0 else high} is outside 0 to {n_samples - 1}; map ids to codes first"
        )


def check_finite(values: Floats, where: Ints, codes: Ints, axis: str) -> None:
    """Refuse non-finite values, naming the first."""
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise InputError(
            f"the signal of sample {codes[first]} at {axis} {where[first]} is {values[first]} "
            f"({int((~finite).sum())} such values); drop non-finite steps before estimating"
        )


def compact(values: Ints) -> tuple[Ints, int]:
    """Renumber integers to 0 … k − 1 in their order and return (codes, k), sorting only where the range is wide."""
    low, high = int(values.min()), int(values.max())
    if high - low < 4 * len(values) + 1024:
        present = np.zeros(high - low + 1, dtype=np.int64)
        present[values - low] = 1
        rank = np.cumsum(present) - 1
        return rank[values - low], int(rank[-1]) + 1
    unique, inverse = np.unique(values, return_inverse=True)
    return inverse.astype(np.int64), len(unique)


def bin_sums(codes: Ints, values: Floats, size: int) -> Floats:
    """Return (size,) sums in float64 of the values, (k,), that share a code, (k,)."""
    return np.asarray(np.bincount(codes, weights=values, minlength=size), dtype=np.float64)


def credibility(variances: Floats, dof: float) -> float:
    """Return Bühlmann's k for noisy variance estimates: the mean of s of them deserves the weight s/(s + k).

    An estimate with `dof` degrees of freedom has sampling variance 2·v²/dof. What the spread of the estimates shows
    beyond that is real difference between samples, τ²; k is the sampling variance over τ² (Bühlmann, 1967), infinite
    where no difference shows.

    Args:
        variances: (n,) estimates.
        dof: degrees of freedom behind each.
    """
    mean, spread = float(variances.mean()), float(variances.var())
    if dof <= 0:
        return np.inf
    real = (spread - 2 * mean**2 / dof) / (1 + 2 / dof)
    return (spread - real) / real if real > 0 else np.inf


def moderate(variances: Floats, dof: float) -> Floats:
    """Shrink noisy variance estimates, (n,), towards their mean, each with the weight 1/(1 + k) of `credibility`."""
    mean = float(variances.mean())
    return mean + (variances - mean) / (1 + credibility(variances, dof))


def one_of(value: str, choices: Sequence[str], name: str) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_level(level: Any) -> None:
    """Refuse a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; choose a confidence level between 0 and 1, such as 0.95")
