"""The two-stage test for subsets that were watched while training, and for every single sample of a recorded run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, bin_sums, compact, signals
from finfluence.influence.metadata import attach
from finfluence.influence.subsets import SampleIndex
from finfluence.influence.table import CONDITION, Reporting, q_values
from finfluence.influence.two_stage import Rule, two_stage

_UNIT = "noise standard deviations"


def watched_observations(watch: pl.DataFrame, subset: str, query: str) -> tuple[Floats, Floats, Floats | None]:
    """The observations of one watched subset and query.

    Args:
        watch: columns step, subset, arm ("with", "without", "auxiliary") and one a query.
        subset: name of the watched subset.
        query: name of the query.

    Returns:
        (n_steps,) O_t with the subset, (n_steps,) O′_t without, and (n_steps,) Ô_t of the auxiliary model or None;
        steps whose batch held nothing but the subset are left out.

    Raises:
        InputError: the subset was not watched.
    """
    rows = watch.filter(pl.col("subset") == subset)
    if rows.is_empty():
        known = sorted(watch["subset"].unique().to_list())
        raise InputError(
            f"subset {subset!r} was not watched (watched: {', '.join(known) or 'none'}); name it in train(watch=...), "
            "or pass its ids"
        )
    wide = rows.pivot(on="arm", index="step", values=query).sort("step")
    wide = wide.filter(pl.col("with").is_finite() & pl.col("without").is_finite())
    auxiliary = wide["auxiliary"].to_numpy().astype(np.float64) if "auxiliary" in wide.columns else None
    return wide["with"].to_numpy().astype(np.float64), wide["without"].to_numpy().astype(np.float64), auxiliary


def watched_frame(
    watch: pl.DataFrame,
    subsets: Sequence[str],
    *,
    query: str,
    rule: Rule,
    reporting: Reporting,
    sizes: Mapping[str, int],
) -> pl.DataFrame:
    """The two-stage estimates of watched subsets, one row each, from the observations of every step.

    Args:
        watch: see `watched_observations`.
        subsets: names of watched subsets.
        query: name of the query.
        rule: see `finfluence.influence.two_stage`.
        reporting: level, alternative and correction.
        sizes: samples in each subset.

    Returns:
        Frame with the columns subset, size, mu, se, ci_low, ci_high, p_value, q_value.

    Raises:
        InputError: no subset, or one that was not watched.
    """
    if not subsets:
        raise InputError("subsets is empty; name at least one watched subset")
    rows: list[tuple[float, ...]] = []
    for subset in subsets:
        o_with, o_without, auxiliary = watched_observations(watch, subset, query)
        found = two_stage(o_with, o_without, auxiliary=auxiliary, rule=rule)
        rows.append((found.mu, found.se, *found.interval(reporting.level), found.p_value(reporting.alternative)))
    keys = {"subset": pl.Series("subset", list(subsets)), "size": pl.Series("size", [sizes[s] for s in subsets])}
    return _frame(keys, rows, rule, reporting, query=query)


def two_stage_samples(
    index: SampleIndex,
    *,
    step: ArrayLike,
    code: ArrayLike,
    value: ArrayLike,
    rule: Rule = "median",
    reporting: Reporting | None = None,
    meta: Sequence[tuple[str, Any]] = (),
) -> pl.DataFrame:
    """The two-stage estimate of every single sample, from the steps whose batch held it.

    O_t is the batch's signal and O′_t the mean of the others times the batch size, as in
    `finfluence.influence.observations`. A sample met fewer than twice, or whose observations do not vary, has null
    estimates.

    Args:
        index: ids of the samples.
        step: (n_signals,) integers.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        rule: see `finfluence.influence.two_stage`.
        reporting: level, alternative and correction.
        meta: what else to attach to the frame.

    Returns:
        Frame with the columns sample, mu, se, ci_low, ci_high, p_value, q_value in code order.

    Raises:
        InputError: no sample was met often enough for a test.
    """
    reporting = reporting or Reporting()
    n = len(index)
    steps, codes, values = signals(step, code, value, n_samples=n)
    row, n_steps = compact(steps)
    total, size = bin_sums(row, values, n_steps), np.bincount(row, minlength=n_steps).astype(np.float64)
    shared = size[row] > 1
    o_with = total[row]
    o_without = (total[row] - values) * size[row] / np.maximum(size[row] - 1, 1)
    order = np.lexsort((steps, codes))
    order = order[shared[order]]
    starts = np.searchsorted(codes[order], np.arange(n + 1))
    rows: list[tuple[float, ...]] = []
    for sample in range(n):
        mine = order[starts[sample] : starts[sample + 1]]
        try:
            found = two_stage(o_with[mine], o_without[mine], rule=rule)
        except InputError:
            rows.append((np.nan,) * 5)
            continue
        rows.append((found.mu, found.se, *found.interval(reporting.level), found.p_value(reporting.alternative)))
    if all(np.isnan(found[0]) for found in rows):
        raise InputError(
            f"no sample was in enough batches for the {rule} rule; train for more epochs or use estimator='gaussian'"
        )
    return _frame({"sample": index.ids}, rows, rule, reporting, **dict(meta))


def _frame(
    keys: dict[str, pl.Series], rows: Sequence[tuple[float, ...]], rule: Rule, reporting: Reporting, **meta: Any
) -> pl.DataFrame:
    mu, se, low, high, p = np.array(rows, dtype=np.float64).reshape(len(rows), 5).T
    columns = {"mu": mu, "se": se, "ci_low": low, "ci_high": high, "p_value": p}
    columns["q_value"] = q_values(p, correction=reporting.correction)
    frame = pl.DataFrame(
        keys | {name: pl.Series(name, column, dtype=pl.Float64).fill_nan(None) for name, column in columns.items()}
    )
    how = {"estimator": rule, "unit": _UNIT, "level": reporting.level, "condition": CONDITION}
    return attach(frame, **how, alternative=reporting.alternative, correction=reporting.correction, **meta)
