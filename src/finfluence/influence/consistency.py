"""Consistency of influence over runs: do other seeds give the same answer, and is that answer right?

Several runs of one training (other seeds) score the same n samples. What they agree on is measured on sets (the top
share of each run, the samples each run flags), on ranks and on the scores themselves. A consistent score can still be
consistently wrong, so where bad rows are known, the joint figure is the share of them that *every* run finds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, check_level


@dataclass(frozen=True)
class Figure:
    """A figure over runs with its interval.

    Attributes:
        value: NaN where it is not defined, for example no run flags anything.
        low: lower end of the interval; NaN where the runs are too few for one.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "undefined"
        if not np.isfinite(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def top_sets(score: ArrayLike, fraction: float) -> NDArray[np.bool_]:
    """Mark the highest-scoring share of the samples in each run.

    Args:
        score: (runs, n) higher is more suspect; equal scores go by their place, first first.
        fraction: share in (0, 1]; at least one sample.

    Returns:
        (runs, n) bool with the same number of samples in each row.

    Raises:
        InputError: a fraction outside (0, 1], non-finite scores.
    """
    scores = _runs(score, "score")
    if not 0 < fraction <= 1:
        raise InputError(f"the top share must lie in (0, 1], got {fraction:g}")
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} scores are not finite; leave those samples out")
    size = max(1, round(fraction * scores.shape[1]))
    members = np.zeros(scores.shape, dtype=bool)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :size]
    np.put_along_axis(members, order, values=True, axis=1)
    return members


def pairwise_jaccard(members: ArrayLike) -> Floats:
    """Jaccard similarity |A ∩ B|/|A ∪ B| of every pair of runs' sets.

    Args:
        members: (runs, n) bool.

    Returns:
        (runs, runs) symmetric; NaN for two empty sets, which agree on nothing.
    """
    sets = _runs(members, "members").astype(bool).astype(np.float64)
    both = sets @ sets.T
    sizes = sets.sum(axis=1)
    either = sizes[:, None] + sizes[None, :] - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def pairwise_spearman(score: ArrayLike) -> Floats:
    """Rank correlation over samples of every pair of runs' scores, (runs, runs); NaN where a run's are all equal."""
    from scipy.stats import rankdata

    ranks = rankdata(_runs(score, "score"), axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1))
    scale = np.outer(norms, norms)
    return np.divide(centred @ centred.T, scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def mean_over_pairs(pairs: ArrayLike, *, level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
    """Mean over the pairs of runs, with a jackknife interval over *runs*.

    Pairs that share a run are not independent, so whole runs are left out in turn (Arvesen 1969, the jackknife of a
    U-statistic) and the interval is Student's with R − 1 degrees of freedom. Simulated coverage of the 95 % interval of
    a Jaccard similarity with 3, 5 or 10 runs: 91 to 98 %; the percentile bootstrap over runs covers 51 to 64 % with
    three and 74 to 93 % with five, and so is not used. With two runs there is one pair and no interval.

    Args:
        pairs: (runs, runs) symmetric, the diagonal is not read; NaN pairs are left out.
        level: of the interval.
        bounds: what the figure cannot leave, (0, 1) for Jaccard and (−1, 1) for correlations.

    Raises:
        InputError: not a square matrix of two or more runs.
    """
    check_level(level)
    matrix = np.asarray(pairs, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise InputError(f"pairs has shape {matrix.shape}; give (runs, runs) for two or more runs")

    def mean(kept: NDArray[np.int64]) -> float:
        off = matrix[np.ix_(kept, kept)][~np.eye(len(kept), dtype=bool)]
        off = off[np.isfinite(off)]
        return float(off.mean()) if off.size else float("nan")

    return _jackknife(mean, len(matrix), level=level, bounds=bounds)


def variation(score: ArrayLike, *, members: ArrayLike | None = None, level: float = 0.95) -> Figure:
    """Coefficient of variation over runs, sd/|mean| of each sample's score: its median over samples.

    Samples whose mean is near zero have no meaningful coefficient, so pass those that matter as `members`. The interval
    is the jackknife's over runs, as in `mean_over_pairs`; it needs three.

    Args:
        score: (runs, n).
        members: (n,) bool, the samples that count; all by default.
        level: of the interval.

    Raises:
        InputError: fewer than two runs, or no member.
    """
    check_level(level)
    scores = _runs(score, "score")
    chosen = np.ones(scores.shape[1], dtype=bool) if members is None else np.asarray(members, dtype=bool)
    if chosen.shape != (scores.shape[1],) or not chosen.any():
        raise InputError(f"members has shape {chosen.shape} and {int(chosen.sum())} samples; name some of the samples")
    if len(scores) < 2:
        raise InputError(f"there is {len(scores)} run; a variation over runs needs two or more")

    def median(kept: NDArray[np.int64]) -> float:
        return float(np.median(_coefficients(scores[kept][:, chosen])))

    return _jackknife(median, len(scores), level=level, bounds=(0.0, np.inf))


def joint_recall(members: ArrayLike, known: ArrayLike, *, level: float = 0.95) -> Figure:
    """Utility and consistency in one figure: the share of known-bad rows that every run's set holds.

    The interval is Wilson's (1927) for a share of the known rows, given these runs. The figure falls with the number
    of runs, so compare methods at the same number.

    Args:
        members: (runs, n) bool, what each run flags.
        known: (n,) bool, the rows known to be bad.
        level: of the interval.

    Raises:
        InputError: shapes that differ, or no known row.
    """
    from scipy.special import ndtri

    check_level(level)
    sets = _runs(members, "members").astype(bool)
    bad = np.asarray(known).astype(bool)
    if bad.shape != (sets.shape[1],):
        raise InputError(f"known has shape {bad.shape}, but there are {sets.shape[1]} samples; give one entry a sample")
    n = int(bad.sum())
    if not n:
        raise InputError("no row is known to be bad; the joint figure needs some")
    share = float(sets[:, bad].all(axis=0).mean())
    z = float(ndtri(0.5 + level / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Figure(share, float(max(centre - half, 0.0)), float(min(centre + half, 1.0)))


def _jackknife(
    statistic: Callable[[NDArray[np.int64]], float], runs: int, *, level: float, bounds: tuple[float, float]
) -> Figure:
    """A statistic of the runs with the interval value ± t·se, se from leaving each run out (Tukey 1958)."""
    from scipy.stats import t

    every = np.arange(runs)
    value = statistic(every)
    if runs < 3:
        return Figure(value, float("nan"), float("nan"))
    left_out = np.array([statistic(np.delete(every, run)) for run in range(runs)])
    if not (np.isfinite(value) and np.isfinite(left_out).all()):
        return Figure(value, float("nan"), float("nan"))
    se = float(np.sqrt((runs - 1) / runs * ((left_out - left_out.mean()) ** 2).sum()))
    half = float(t.ppf(0.5 + level / 2, runs - 1)) * se
    return Figure(value, max(value - half, bounds[0]), min(value + half, bounds[1]))


def _coefficients(scores: Floats) -> Floats:
    """(n,) sd/|mean| over runs; infinite where the mean is zero and the runs differ."""
    mean, sd = np.abs(scores.mean(axis=0)), scores.std(axis=0, ddof=1)
    return np.divide(sd, mean, out=np.where(sd > 0, np.inf, 0.0), where=mean > 0)


def _runs(array: ArrayLike, name: str) -> NDArray[Any]:
    found = np.asarray(array)
    if found.ndim != 2 or not found.size:
        raise InputError(f"{name} has shape {found.shape}; give (runs, n)")
    return found
