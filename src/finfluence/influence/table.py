"""Influence as tables: one row a sample, subset or group, with interval, p-value and q-value."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, check_level, one_of
from finfluence.influence.metadata import attach, metadata
from finfluence.influence.noise import Noise
from finfluence.influence.shift import (
    NO_ERROR,
    Budget,
    DerivativeError,
    Estimates,
    Removal,
    Replacement,
    sample_estimates,
    subset_estimates,
)
from finfluence.influence.subsets import Ids, PackedSubsets, SampleIndex, Subsets
from finfluence.influence.totals import SampleTotals

Alternative = Literal["two-sided", "harmful", "supporting"]
Correction = Literal["bh", "by"]
Estimator = Literal["gaussian", "tracin"]

CONDITION = "conditional on the initialisation"


@dataclass(frozen=True)
class Reporting:
    """How estimates become a table.

    Attributes:
        level: confidence level of the two-sided interval.
        alternative: of the p-value against μ = 0: "two-sided", "harmful" (μ < 0) or "supporting" (μ > 0).
        correction: q-values by Benjamini–Hochberg ("bh", 1995) or Benjamini–Yekutieli ("by", 2001, under any
            dependence).
    """

    level: float = 0.95
    alternative: Alternative = "two-sided"
    correction: Correction = "bh"

    def __post_init__(self) -> None:
        check_level(self.level)
        one_of(self.alternative, ("two-sided", "harmful", "supporting"), "alternative")
        one_of(self.correction, ("bh", "by"), "correction")


def report(
    mu: ArrayLike,
    se: ArrayLike,
    *,
    reporting: Reporting | None = None,
    dof: ArrayLike = np.inf,
    null: ArrayLike | None = None,
    null_dof: ArrayLike | None = None,
) -> dict[str, pl.Series]:
    """Return the columns mu, se, ci_low, ci_high, p_value and q_value of estimates.

    Args:
        mu: (k,) estimates; NaN becomes null.
        se: (k,) standard errors; NaN becomes null and leaves the columns behind it null.
        reporting: level, alternative and correction.
        dof: (k,) or () degrees of freedom of se; infinite: normal quantiles.
        null: (k,) standard errors where μ is 0, for the p-values; se by default.
        null_dof: (k,) or () degrees of freedom of these; dof by default.
    """
    from scipy.special import ndtr, ndtri, stdtr, stdtrit

    reporting = reporting or Reporting()
    mus, errors = np.asarray(mu, dtype=np.float64), np.asarray(se, dtype=np.float64)
    normal, finite = _degrees(dof, mus)
    tail = 0.5 + reporting.level / 2
    quantile = np.where(normal, ndtri(tail), stdtrit(finite, tail))
    normal, finite = _degrees(dof if null_dof is None else null_dof, mus)
    tested = errors if null is None else np.asarray(null, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(tested > 0, mus / tested, np.nan)
    below = np.where(normal, ndtr(z), stdtr(finite, z))
    above = np.where(normal, ndtr(-z), stdtr(finite, -z))
    p = {"harmful": below, "supporting": above, "two-sided": 2 * np.minimum(below, above)}[reporting.alternative]
    columns = {
        "mu": mus,
        "se": errors,
        "ci_low": mus - quantile * errors,
        "ci_high": mus + quantile * errors,
        "p_value": p,
        "q_value": q_values(p, correction=reporting.correction),
    }
    return {name: pl.Series(name, values, dtype=pl.Float64).fill_nan(None) for name, values in columns.items()}


def _degrees(dof: ArrayLike, like: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """Where degrees of freedom are infinite, and those that are not."""
    freedom = np.broadcast_to(np.asarray(dof, dtype=np.float64), like.shape)
    return np.isinf(freedom), np.where(np.isinf(freedom), 1.0, freedom)


def null_errors(frame: pl.DataFrame) -> Floats:
    """Standard errors of a frame's estimates where μ is 0, (k,): without what is relative to μ; NaN where unknown."""
    mu, se = (frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in ("mu", "se"))
    relative = float(metadata(frame).get("relative_error", 0.0))
    return np.sqrt(np.maximum(se**2 - (relative * mu) ** 2, 0.0))


def q_values(p: ArrayLike, *, correction: Correction = "bh") -> Floats:
    """Return false-discovery q-values, (k,), of p-values, (k,); NaN stays NaN and is not counted as a test."""
    from scipy.stats import false_discovery_control

    values = np.asarray(p, dtype=np.float64)
    q = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        q[known] = false_discovery_control(np.minimum(values[known], 1.0), method=correction)
    return q


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of a run's samples on one query, ready for any subset.

    Attributes:
        index: ids of the n samples in code order.
        totals: of the n samples.
        noise: of the run; not needed for tracin.
        estimator: "gaussian": μ = Δ/σ with its standard error. "tracin": the mu column holds the plain −Σ x, in units
            of the measurement, as TracIn (Pruthi et al. 2020, arXiv 2002.08484) with its sign turned to ours; it has no
            error, so the columns behind it are null.
        budget: see `Removal`.
        replacement: see `Removal`.
        reporting: level, alternative and correction.
        error: see `subset_estimates`.
        shared: adds the column `se_shared`, the part of se that other runs of the training have in common with this.
        meta: what else to attach to the frames (query, run, …).
    """

    index: SampleIndex
    totals: SampleTotals
    noise: Noise | None = None
    estimator: Estimator = "gaussian"
    budget: Budget = "steps"
    replacement: Replacement = "small"
    reporting: Reporting = Reporting()
    error: DerivativeError = NO_ERROR
    shared: bool = False
    meta: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        one_of(self.estimator, ("gaussian", "tracin"), "estimator")
        Removal(self.budget, self.replacement)
        if len(self.index) != self.totals.n_samples:
            raise InputError(
                f"there are {len(self.index)} ids for {self.totals.n_samples} totals; take both from one run"
            )
        if self.estimator == "gaussian" and self.noise is None:
            raise InputError("the gaussian estimator needs the noise of the run; estimate it, or choose tracin")

    def samples(self) -> pl.DataFrame:
        """Return one row a sample in code order: sample, mu, se, ci_low, ci_high, p_value, q_value.

        Samples that no batch held have null estimates.
        """
        if self.estimator == "tracin" or self.noise is None:
            found = _tracin(-self.totals.total, np.ones(self.totals.n_samples, dtype=np.int64))
        else:
            found = sample_estimates(self.totals, self.noise, removal=self._removal, error=self.error)
        return self._frame({"sample": self.index.ids}, found)

    def subsets(self, subsets: Subsets) -> pl.DataFrame:
        """Return one row a subset: subset, size, mu, se, ci_low, ci_high, p_value, q_value.

        Args:
            subsets: mapping of names to sample ids, or a sequence of them, named by its own index.

        Raises:
            InputError: see `SampleIndex.pack`.
        """
        packed = self.index.pack(subsets)
        return self._packed("subset", packed)

    def groups(self, labels: Ids) -> pl.DataFrame:
        """Return one row a group, sorted by label: group, size, mu, se, ci_low, ci_high, p_value, q_value.

        Args:
            labels: (n,) label of every sample in code order; samples with a null label are in no group.

        Raises:
            InputError: another number of labels than samples, no labels, or one group that is the whole training set.
        """
        series = pl.Series("group", labels)
        if len(series) != len(self.index):
            raise InputError(f"there are {len(series)} group labels for {len(self.index)} samples; give one a sample")
        frame = (
            pl.DataFrame({"group": series, "code": np.arange(len(series))}).drop_nulls("group").sort("group", "code")
        )
        counts = frame.group_by("group", maintain_order=True).len()
        if not len(counts):
            raise InputError("every group label is null; choose a column with labels")
        sizes = counts["len"].cast(pl.Int64).to_numpy()
        if sizes.max() == len(self.index):
            raise InputError(
                f"group {counts['group'][0]!r} is the whole training set; choose a column with several groups"
            )
        offsets = np.r_[0, np.cumsum(sizes)[:-1]]
        packed = PackedSubsets(counts["group"].to_list(), frame["code"].to_numpy(), offsets, sizes)
        return self._packed("group", packed, names=counts["group"])

    def with_reporting(self, **changes: Any) -> "InfluenceTable":
        """Return the same table with another level, alternative or correction."""
        return replace(self, reporting=replace(self.reporting, **changes))

    @property
    def _removal(self) -> Removal:
        return Removal(self.budget, self.replacement)

    def _packed(self, key: str, packed: PackedSubsets, *, names: pl.Series | None = None) -> pl.DataFrame:
        if self.estimator == "tracin" or self.noise is None:
            found = _tracin(-packed.sums(self.totals.total), packed.sizes)
        else:
            found = subset_estimates(self.totals, self.noise, packed=packed, removal=self._removal, error=self.error)
        labels = pl.Series(key, packed.names) if names is None else names
        return self._frame({key: labels, "size": pl.Series("size", found.size)}, found)

    def _relative_errors(self, keys: Mapping[str, Any]) -> dict[str, float]:
        """What `null` leaves out of `se`, over μ, and the part of it that other runs have in common with this one."""
        shared = self.error.joint if "size" in keys else self.error.of_one
        grid = self.totals.common_error if self.budget == "steps" else 0.0
        return {"relative_error": math.hypot(shared, grid), "shared_relative_error": shared}

    def _frame(self, keys: dict[str, pl.Series], found: Estimates) -> pl.DataFrame:
        columns = report(found.mu, found.se, reporting=self.reporting, null=found.null)
        if self.shared:
            columns["se_shared"] = pl.Series(np.zeros(len(found.mu)) if found.shared is None else found.shared)
        frame = pl.DataFrame({**keys, **columns})
        how = {
            "estimator": self.estimator,
            "unit": "noise standard deviations" if self.estimator == "gaussian" else "units of the measurement",
            "budget": self.budget,
            "replacement": self.replacement,
            **asdict(self.reporting),
            "condition": CONDITION,
        }
        if self.estimator == "gaussian" and self.noise is not None:
            how |= {"sigma": self.noise.sigma, "noise": self.noise.method, "noise_note": self.noise.note}
            how |= {"path_noise": self.error.path, **self._relative_errors(keys)}
        return attach(frame, **how, **dict(self.meta))


def _tracin(mu: Floats, sizes: np.ndarray) -> Estimates:
    return Estimates(mu, np.full(len(mu), np.nan), sizes)
