"""Several recorded runs of one training as one estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from finfluence.errors import InputError
from finfluence.influence import Alternative, Correction, Reporting, attach, metadata
from finfluence.influence import pool as pool_frames
from finfluence.runs.estimates import Shifts
from finfluence.runs.run import Run
from finfluence.signals import SELF


def pool(
    runs: Sequence[Run],
    query: str,
    *,
    subsets: Mapping[str, Any] | None = None,
    groups: str | None = None,
    level: float = 0.95,
    alternative: Alternative = "two-sided",
    correction: Correction = "bh",
    shifts: Shifts = "kriged",
    relative: bool = False,
) -> pl.DataFrame:
    """Influence averaged over several runs (seeds) of the same training.

    A single run's μ is conditional on its initialisation and its batch order. The pooled standard error has the
    variance between runs in it. Runs differ in their noise σ: before averaging, every μ is carried to the unit of the
    root mean square σ.

    Args:
        runs: two or more runs on the same samples.
        query: a query that all of them recorded.
        subsets: ids of each subset by name.
        groups: column of the sample table to group by.
        level: of the intervals.
        alternative: of the p-values.
        correction: of the q-values.
        shifts: as in `Run.influence`.
        relative: adds the column `relative`, the mean over runs; as in `Run.influence`.

    Returns:
        The columns of `Run.influence`.

    Raises:
        InputError: fewer than two runs, runs on different samples, or without what `relative` needs.
    """
    if len(runs) < 2:
        raise InputError(f"pooling needs at least two runs, got {len(runs)}; a single run has run.influence(query)")
    frames = [
        run.influence(query, subsets=subsets, groups=groups, level=level, shifts=shifts, relative=relative)
        for run in runs
    ]
    reporting = Reporting(level=level, alternative=alternative, correction=correction)
    if query == SELF:  # each run's own unit: there is no noise of the measurement in it
        return pool_frames(frames, reporting=reporting)
    sigmas = [float(metadata(frame)["sigma"]) for frame in frames]
    common = (sum(sigma**2 for sigma in sigmas) / len(sigmas)) ** 0.5
    scaled = ["mu", "se", *(["relative"] if relative else [])]
    frames = [
        attach(frame.with_columns(pl.col(scaled) * (sigma / common)), **metadata(frame))
        for frame, sigma in zip(frames, sigmas, strict=True)
    ]
    pooled = pool_frames(frames, reporting=reporting)
    if not relative:
        return pooled
    means = pl.concat(frame.select("sample", "relative") for frame in frames).group_by("sample").mean()
    joined = pooled.join(means, on="sample", how="left", maintain_order="left")
    return attach(joined, **metadata(pooled))
