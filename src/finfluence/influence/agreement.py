"""Agreement of estimated influence with retraining, never without the ceiling that the truth's own noise sets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, check_level


@dataclass(frozen=True)
class Ceiling:
    """The best agreement that a noisy truth allows.

    Attributes:
        split_half: mean Spearman correlation between the truths of two halves of the retrainings.
        reliability: of the whole truth, 2r/(1 + r) (Spearman 1910, Brown 1910), 0 where r ≤ 0.
        correlation: √reliability, the correlation that the error-free influence itself would have with this truth.
    """

    split_half: float
    reliability: float
    correlation: float


@dataclass(frozen=True)
class Agreement:
    """How well estimates agree with a truth by retraining.

    Attributes:
        spearman: mean over queries of the rank correlation over subsets.
        spearman_interval: bootstrap interval over subsets.
        slope: of the regression, with intercept, of true on estimated μ, all pairs together; 1 is calibrated.
        slope_interval: bootstrap interval over subsets.
        coverage: share of truths within the estimate's interval, both errors counted; NaN without errors.
        ceiling: the best that `spearman` can be.
        level: of all intervals.
        n_queries: number of queries that entered.
        n_subsets: number of subsets.
    """

    spearman: float
    spearman_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]
    coverage: float
    ceiling: Ceiling
    level: float
    n_queries: int
    n_subsets: int

    def __str__(self) -> str:
        low, high = self.spearman_interval
        text = (
            f"Spearman {self.spearman:.2f} [{low:.2f}, {high:.2f}] of at most {self.ceiling.correlation:.2f} "
            f"(split halves {self.ceiling.split_half:.2f}), {self.n_queries} queries × {self.n_subsets} subsets; "
            f"slope of true on estimated {self.slope:.2f} [{self.slope_interval[0]:.2f}, {self.slope_interval[1]:.2f}]"
        )
        if np.isfinite(self.coverage):
            text += f"; {self.level:.0%} intervals cover {self.coverage:.0%}"
        return text


def ceiling(half_a: ArrayLike, half_b: ArrayLike) -> Ceiling:
    """Work out the ceiling from the truths of two disjoint halves of the retrainings.

    Args:
        half_a: (n_queries, n_subsets) μ from one half of the runs of both arms.
        half_b: (n_queries, n_subsets) μ from the other half.

    Raises:
        InputError: shapes that differ, or fewer than three subsets.
    """
    a, b = _pair(half_a, half_b, names="half_a and half_b")
    r = _mean_spearman(a, b)
    reliability = max(2 * r / (1 + r), 0.0) if r > -1 else 0.0
    return Ceiling(r, reliability, reliability**0.5)


def agreement(
    estimated: ArrayLike,
    truth: ArrayLike,
    *,
    ceiling: Ceiling,
    estimated_se: ArrayLike | None = None,
    truth_se: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Compare estimated μ with μ by retraining.

    The mean Spearman correlation over queries is the linear datamodelling score (Park et al. 2023, arXiv 2303.14186),
    in μ. Its interval and the slope's are percentile bootstrap over subsets, whose retrainings the queries share. An
    estimate's own error flattens the slope; the truth's does not.

    Args:
        estimated: (n_queries, n_subsets) estimated μ.
        truth: (n_queries, n_subsets) μ by retraining.
        ceiling: from the truth's split halves.
        estimated_se: (n_queries, n_subsets) standard errors.
        truth_se: (n_queries, n_subsets) standard errors; with `estimated_se` gives the coverage.
        level: of the intervals.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        InputError: shapes that differ, non-finite values, fewer than three subsets, or constant estimates.
    """
    check_level(level)
    x, y = _pair(estimated, truth, names="estimated and truth")
    if np.ptp(x) == 0:
        raise InputError(f"all estimates are {x.flat[0]:g}; there is nothing to compare with the truth")
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, 2))
    for row in range(resamples):
        pick = rng.integers(0, x.shape[1], x.shape[1])
        draws[row] = _mean_spearman(x[:, pick], y[:, pick]), _slope(x[:, pick], y[:, pick])
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    return Agreement(
        spearman=_mean_spearman(x, y),
        spearman_interval=(float(low[0]), float(high[0])),
        slope=_slope(x, y),
        slope_interval=(float(low[1]), float(high[1])),
        coverage=coverage(x, y, estimated_se=estimated_se, truth_se=truth_se, level=level),
        ceiling=ceiling,
        level=level,
        n_queries=x.shape[0],
        n_subsets=x.shape[1],
    )


def coverage(
    estimated: ArrayLike,
    truth: ArrayLike,
    *,
    estimated_se: ArrayLike | None,
    truth_se: ArrayLike | None,
    level: float = 0.95,
) -> float:
    """Share of pairs with |estimated − truth| ≤ z·√(se_estimated² + se_truth²); NaN where an error is not given."""
    from scipy.special import ndtri

    if estimated_se is None or truth_se is None:
        return float("nan")
    x, y = np.asarray(estimated, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    errors = np.asarray(estimated_se, dtype=np.float64), np.asarray(truth_se, dtype=np.float64)
    if not x.shape == y.shape == errors[0].shape == errors[1].shape:
        raise InputError(
            f"estimates have shape {x.shape}, their errors {errors[0].shape} and {errors[1].shape}; give one each"
        )
    return float((np.abs(x - y) <= ndtri(0.5 + level / 2) * np.hypot(*errors)).mean())


def _pair(first: ArrayLike, second: ArrayLike, *, names: str) -> tuple[Floats, Floats]:
    a, b = (np.atleast_2d(np.asarray(array, dtype=np.float64)) for array in (first, second))
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"{names} have shapes {a.shape} and {b.shape}; give (n_queries, n_subsets) for both")
    if a.shape[1] < 3:
        raise InputError(f"{names} have {a.shape[1]} subsets; a correlation over subsets needs three or more")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"{names} hold values that are not finite; leave those queries or subsets out")
    return a, b


def _mean_spearman(x: Floats, y: Floats) -> float:
    """Mean over rows of the Spearman correlation; a row that is constant on either side has none and is left out."""
    from scipy.stats import rankdata

    a, b = (rankdata(array, axis=1) for array in (x, y))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    known = scale > 0
    return float(((a * b).sum(axis=1)[known] / scale[known]).mean()) if known.any() else float("nan")


def _slope(x: Floats, y: Floats) -> float:
    centred = x - x.mean()
    square = float((centred**2).sum())
    return float((centred * y).sum() / square) if square > 0 else float("nan")
