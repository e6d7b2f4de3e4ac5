"""Per-sample totals of one query's signals over a run: everything that the shift of any subset needs."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, Ints, bin_sums, compact, moderate, one_of, signals
from finfluence.influence.grid import Course, Panel, Positions, ShuffledEpochs, grid_weights

Centre = Literal["batch", "others"]


@dataclass(frozen=True)
class SampleTotals:
    """Sums over a run of each sample's signals, for one query.

    Attributes:
        visits: (n,) times that the sample was in a batch (full signals: epochs).
        total: (n,) Σ_t x_{i,t}, units of the measurement.
        centred: (n,) Σ_t (x_{i,t} − x̄_t).
        centre: what x̄_t is: the mean over step t's "batch", or over the "others" in it.
        batch: mean number of samples that x̄_t averages, as seen by a sample (full signals: n).
        centred_variance: (n,) variance of `centred` from the choice of grid positions; only full signals have it.
        total_variance: (n,) the same of `total`.
        common_error: relative error of all `centred` alike from that choice, which falls on the course that samples
            have in common (see `Course`); `centred_variance` is that of the rest.
    """

    visits: Floats
    total: Floats
    centred: Floats
    centre: Centre = "batch"
    batch: float = np.inf
    centred_variance: Floats | None = None
    total_variance: Floats | None = None
    common_error: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.centre, ("batch", "others"), "centre")
        if not len(self.visits) == len(self.total) == len(self.centred):
            lengths = f"{len(self.visits)}, {len(self.total)} and {len(self.centred)}"
            raise InputError(f"visits, total and centred have lengths {lengths}; give one value a sample in each")

    @property
    def n_samples(self) -> int:
        """Size of the training set."""
        return len(self.total)

    @classmethod
    def from_signals(
        cls, step: ArrayLike, code: ArrayLike, *, value: ArrayLike, n_samples: int, centre: Centre = "batch"
    ) -> "SampleTotals":
        """Sum the signals of the samples that were in each step's batch, in one vectorised pass.

        Args:
            step: (n_signals,) integers, any order.
            code: (n_signals,) sample codes, 0 to n_samples − 1.
            value: (n_signals,) signals, units of the measurement.
            n_samples: n.
            centre: "batch": x̄_t is the mean of the whole batch, the sample included (method of the shift
                Δ_S = −Σ(x − x̄)). Because the sample is part of its own comparison, this shrinks every shift by
                1 − 1/b. "others": x̄_t is the mean of the b − 1 other samples, which has no such bias:
                x − x̄_others = (x − x̄)·b/(b − 1).

        Raises:
            InputError: unequal lengths, codes out of range, non-finite values, or batches of one sample throughout.
        """
        one_of(centre, ("batch", "others"), "centre")
        steps, codes, values = signals(step, code, value, n_samples=n_samples)
        difference, size = centred_signals(steps, values)
        if centre == "others":
            difference = difference * (size / np.maximum(size - 1, 1))
        return cls(
            visits=np.bincount(codes, minlength=n_samples).astype(np.float64),
            total=bin_sums(codes, values, n_samples),
            centred=bin_sums(codes, difference, n_samples),
            centre=centre,
            batch=float(1 / np.mean(1 / size)),
        )

    @classmethod
    def from_panel(
        cls, panel: Panel, sampler: ShuffledEpochs, *, centre: Centre = "batch", positions: Positions = "random"
    ) -> "SampleTotals":
        """Sum "full" signals: every sample evaluated on the grid of positions of every epoch.

        A sample's total is the sum over epochs of its mean over the epoch's slots, which is what a batch total is in
        expectation over shuffles. The mean over G of P positions errs with variance (1/G − 1/P)·s², s² the variance of
        the sample's centred signals over the grid with G − 1 ("random" positions), or half their mean squared
        successive difference ("regular" positions: one a stratum, neighbouring strata collapsed; Cochran 1977, 5A.12).
        For a subset these variances are added, that is, errors of different samples are taken as uncorrelated, but for
        the course that centred signals have in common (`Course`): where the grid falls on it makes all of them too
        large or too small together, a relative error of the same size for each sample and subset. What is left of few
        positions says little of a single sample's variance, which is shrunk to the mean of all (`moderate`).

        Args:
            panel: all n samples in every epoch.
            sampler: the sampler of the run.
            centre: as in `from_signals`, over the n samples at each position.
            positions: how the grid was chosen, see `grid_weights`.

        Raises:
            InputError: a sample is missing from the panel.
        """
        one_of(centre, ("batch", "others"), "centre")
        n = sampler.n_samples
        total, centred, total_variance, centred_variance = np.zeros((4, n))
        common = degrees = 0.0
        epochs = 0
        for codes, places, matrix in panel.epochs(n):
            if len(codes) != n:
                raise InputError(
                    f"the panel holds {len(codes)} of {n} samples; full signals need every sample in every epoch"
                )
            grid = grid_weights(places, sampler, positions=positions)
            scaled = matrix * grid.sizes
            deviation = scaled - scaled.mean(axis=0)
            if centre == "others":
                deviation *= n / (n - 1)
            total += scaled @ grid.linear / n
            centred += deviation @ grid.linear / n
            factor = (grid.n_positions / n) ** 2 * (1 / len(places) - 1 / grid.n_positions)
            total_variance += factor * grid_spread(scaled, positions)
            course = Course.of(deviation)
            centred_variance += factor * course.spared * grid_spread(course.rest, positions)
            degrees += course.degrees
            common += factor * _course_spread(course.course, positions) * float((course.sizes**2).sum())
            epochs += 1
        visits, square = np.full(n, float(epochs)), float((centred**2).sum())
        error = math.sqrt(common / square) if square > 0 else 0.0
        own = moderate(centred_variance, degrees)
        return cls(visits, total, centred, centre, float(n), own, total_variance, error)

    def __add__(self, other: "SampleTotals") -> "SampleTotals":
        """Add the totals of another stretch of the same run, with no step in both: a large store is read in parts."""
        if self.n_samples != other.n_samples or self.centre != other.centre:
            raise InputError("totals of different samples or centring cannot be added; read both parts the same way")
        visits = self.visits + other.visits
        share = float(self.visits.sum() / visits.sum())
        batch = 1 / (share / self.batch + (1 - share) / other.batch)
        common = sum(
            float((part.common_error * part.centred) @ (part.common_error * part.centred)) for part in (self, other)
        )
        square = float(((self.centred + other.centred) ** 2).sum())
        return SampleTotals(
            visits,
            self.total + other.total,
            self.centred + other.centred,
            self.centre,
            batch,
            _sum(self.centred_variance, other.centred_variance),
            _sum(self.total_variance, other.total_variance),
            math.sqrt(common / square) if square > 0 else 0.0,
        )


def centred_signals(step: Ints, value: Floats) -> tuple[Floats, Floats]:
    """Return (x − x̄_t, b_t) for every signal, both (n_signals,), x̄_t the mean and b_t the size of its step.

    Raises:
        InputError: every step holds a single sample, so that there is nothing to compare a sample with.
    """
    steps, n_steps = compact(step)
    size = np.bincount(steps, minlength=n_steps).astype(np.float64)
    if size.max() < 2:
        raise InputError(
            "every batch has one sample, so no sample can be compared with others; use batches of two or more"
        )
    mean = bin_sums(steps, value, n_steps) / size
    return value - mean[steps], size[steps]


def _course_spread(course: Floats, positions: Positions) -> float:
    """Variance over positions of a course (G,) that many samples have in common, as the choice of its grid sees it.

    Regular positions are joined by straight lines, so a trend is no error of theirs: a sixth of the mean squared second
    difference, the variance of what jumps about and little of what is smooth. Against all 25 positions of an epoch the
    error that follows is 0.5 to 2 times the true one (by hand).
    """
    if positions == "random":
        return float(course.var(ddof=1))
    return float((np.diff(course, n=2) ** 2).mean()) / 6 if len(course) > 2 else 0.0


def grid_spread(matrix: Floats, positions: Positions) -> Floats:
    """Variance over positions of each sample's signals on the grid, (n, G), as its choice sees it, see `from_panel`."""
    if matrix.shape[1] < 2:
        return np.zeros(len(matrix))
    if positions == "random":
        return matrix.var(axis=1, ddof=1)
    return (np.diff(matrix, axis=1) ** 2).mean(axis=1) / 2


def _sum(first: Floats | None, second: Floats | None) -> Floats | None:
    if first is None or second is None:
        if first is not second:
            raise InputError("batch and full totals cannot be added; read both parts the same way")
        return None
    return first + second
