"""f-INE's own two-stage estimator: a threshold test between a run's per-step signals with and without a subset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, bin_sums, compact, integers, one_of, signals
from finfluence.influence.metadata import attach
from finfluence.influence.subsets import SampleIndex, Subsets
from finfluence.influence.table import CONDITION, Alternative, Reporting, q_values
from finfluence.tradeoff import GaussianInfluence, compare

Rule = Literal["median", "max", "gaussian", "clopper-pearson"]
RULES: tuple[Rule, ...] = ("median", "max", "gaussian", "clopper-pearson")


@dataclass(frozen=True)
class TwoStage:
    """Result of the two-stage test.

    Attributes:
        step: influence of one step, as the rule estimates it.
        steps: T, number of steps it is composed over.
        rule: the rule.
    """

    step: GaussianInfluence
    steps: int
    rule: Rule

    @property
    def mu(self) -> float:
        """μ of the run, √T times that of a step."""
        return self.step.mu * self.steps**0.5

    @property
    def se(self) -> float:
        """Standard error of μ as if the 2T observations were independent."""
        return self.step.se * self.steps**0.5

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the interval of μ at this level."""
        low, high = self.step.interval(level)
        return low * self.steps**0.5, high * self.steps**0.5

    def p_value(self, alternative: Alternative = "two-sided") -> float:
        """Return the p-value of μ = 0 against "two-sided", "harmful" (μ < 0) or "supporting" (μ > 0)."""
        return self.step.p(alternative)


def two_stage(
    o_with: ArrayLike,
    o_without: ArrayLike,
    *,
    auxiliary: ArrayLike | None = None,
    rule: Rule = "median",
    steps: int | None = None,
) -> TwoStage:
    """Estimate a watched subset's μ from per-step observations, by f-INE (Panda et al. 2026, arXiv 2510.10510).

    Stage 1 collects at each step the signal of the batch with the subset, O_t = x(B_t ∪ S), and without, O′_t = x(B_t ∖
    S), under live sensitivities. To decorrelate successive steps, the signal Ô_t of an auxiliary model, trained on D∖S
    with its own batches, is subtracted from both. Stage 2 scans thresholds τ for the test between O′ and O and takes
    μ_τ = Φ⁻¹(1 − α_τ) − Φ⁻¹(β_τ), then composes T equal steps: μ = √T·μ_step (Cor. 2.7, an upper bound on the
    magnitude).

    This follows the paper's description; its printed listing was not available. The largest-magnitude rule ("max", the
    paper's) is biased upward: with 200 observations a side and no influence its mean magnitude is about 0.56 a step, so
    the default is the median over thresholds. Steps are not quite independent and O, O′ share most of their batch, so
    intervals are indicative.

    Args:
        o_with: (T,) observations with the subset, units of the measurement.
        o_without: (T,) without.
        auxiliary: (T,) observations of the auxiliary model.
        rule: "median" over thresholds, "max", "gaussian" (mean difference over sd) or "clopper-pearson" (a lower bound
            on |μ|).
        steps: T of the whole run, where the observations are only some of its steps; by default their number.

    Raises:
        InputError: unequal lengths, or observations that `finfluence.compare` cannot use.
    """
    one_of(rule, RULES, "rule")
    first, second = np.asarray(o_with, dtype=np.float64), np.asarray(o_without, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"o_with and o_without have shapes {first.shape} and {second.shape}; give one value a step")
    if auxiliary is not None:
        third = np.asarray(auxiliary, dtype=np.float64)
        if third.shape != first.shape:
            raise InputError(
                f"auxiliary has shape {third.shape}, the observations {first.shape}; give one value a step"
            )
        first, second = first - third, second - third
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}; give the number of steps of the run")
    return TwoStage(compare(first, second, estimator=rule), len(first) if steps is None else steps, rule)


def observations(step: ArrayLike, code: ArrayLike, *, value: ArrayLike, subset: ArrayLike) -> tuple[Floats, Floats]:
    """Observations with and without a subset, rebuilt from recorded signals.

    For a subset that was not watched while training, each step whose batch holds some of it offers
    O_t = Σ_{i∈B_t} x_{i,t} and O′_t = |B_t|/(|B_t| − |B_t∩S|)·Σ_{i∈B_t∖S} x_{i,t}: the batch as it was, and its mean
    over what is left. Steps without any of S, where both agree, and steps with nothing but S are left out.

    Args:
        step: (n_signals,) integers.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        subset: (s,) sample codes.

    Returns:
        (O, O′), each (steps that meet S,), in the order of the steps.

    Raises:
        InputError: no step meets the subset and another sample.
    """
    members = integers(subset, "subset")
    codes = integers(code, "code")
    largest = int(max(codes.max(initial=1), members.max(initial=1)))
    steps, codes, values = signals(step, codes, value, n_samples=largest + 1)
    row, n_steps = compact(steps)
    inside = np.zeros(largest + 1, dtype=bool)
    inside[members] = True
    kept = ~inside[codes]
    size = np.bincount(row, minlength=n_steps)
    left = np.bincount(row[kept], minlength=n_steps)
    with_subset = bin_sums(row, values, n_steps)
    without = bin_sums(row[kept], values[kept], n_steps)
    met = (left < size) & (left > 0)
    if not met.any():
        raise InputError(
            "no step's batch holds the subset together with other samples; it cannot be tested on this run"
        )
    return with_subset[met], without[met] * (size[met] / left[met])


def two_stage_subsets(
    index: SampleIndex,
    subsets: Subsets,
    *,
    step: ArrayLike,
    code: ArrayLike,
    value: ArrayLike,
    rule: Rule = "median",
    reporting: Reporting | None = None,
    key: str = "subset",
    meta: Sequence[tuple[str, Any]] = (),
) -> pl.DataFrame:
    """Return the two-stage estimates of subsets of a recorded run, one row each.

    μ composes over the steps that meet the subset; the others do not tell the two apart.

    Args:
        index: ids of the samples.
        subsets: mapping of names to sample ids, or a sequence of them.
        step: (n_signals,) integers.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        rule: see `two_stage`.
        reporting: level, alternative and correction.
        key: name of the first column.
        meta: what else to attach to the frame.

    Returns:
        Frame with the columns key, size, mu, se, ci_low, ci_high, p_value, q_value.
    """
    reporting = reporting or Reporting()
    packed = index.pack(subsets)
    codes = integers(code, "code")
    rows: list[tuple[float, ...]] = []
    for row in range(len(packed.sizes)):
        o_with, o_without = observations(step, codes, value=value, subset=packed.codes_of(row))
        found = two_stage(o_with, o_without, rule=rule)
        rows.append((found.mu, found.se, *found.interval(reporting.level), found.p_value(reporting.alternative)))
    mu, se, low, high, p = np.array(rows).T
    q = q_values(p, correction=reporting.correction)
    columns = {"mu": mu, "se": se, "ci_low": low, "ci_high": high, "p_value": p, "q_value": q}
    frame = pl.DataFrame(
        {key: pl.Series(key, packed.names), "size": packed.sizes}
        | {name: pl.Series(name, values, dtype=pl.Float64).fill_nan(None) for name, values in columns.items()}
    )
    how = {"estimator": rule, "unit": "noise standard deviations", "level": reporting.level, "condition": CONDITION}
    return attach(frame, **how, alternative=reporting.alternative, correction=reporting.correction, **dict(meta))
