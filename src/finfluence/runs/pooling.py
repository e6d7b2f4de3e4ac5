"""Several recorded runs of one training, asked as one: what a rerun would say again."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from finfluence.errors import FinfluenceWarning, InputError
from finfluence.influence import Alternative, Correction, Reporting, aligned, attach, metadata
from finfluence.influence import pool as pool_frames
from finfluence.runs._facade import Facade
from finfluence.runs.estimates import Shifts
from finfluence.runs.run import Run, open_run
from finfluence.signals import SELF
from finfluence.tradeoff import SIGN_CONVENTION


class PooledRuns(Facade):
    """Runs (seeds) of one training, with influence averaged over them.

    A single run's μ is conditional on its initialisation and its batch order; what is chosen by it, another run may not
    choose. The pooled standard error has the variance between runs in it (see `finfluence.influence.pool_estimates`).

    Args:
        runs: two or more runs, or their directories, on the same samples.

    Attributes:
        runs: the runs.
        queries: names of the queries that all of them recorded.

    Raises:
        InputError: fewer than two runs, one run twice, runs on other samples or contents, of another sensitivity, or
            measured after other epochs.
    """

    def __init__(self, runs: Sequence[Run | str | os.PathLike[str]]) -> None:
        self.runs = tuple(run if isinstance(run, Run) else open_run(run) for run in runs)
        if len(self.runs) < 2:
            raise InputError(
                f"pooling needs at least two runs, got {len(self.runs)}; a single run has run.influence(query)"
            )
        check_same_data(self.runs)
        first = self.runs[0]
        for run in self.runs[1:]:
            if (run.sensitivity == "live") != (first.sensitivity == "live"):
                raise InputError(
                    f"{first.directory} has {first.sensitivity} signals and {run.directory} {run.sensitivity} ones, "
                    "which are no two estimates of one number; pool runs of one sensitivity"
                )
            if run.measured_epochs != first.measured_epochs:
                raise InputError(
                    f"{first.directory} was measured after {_epochs(first)} and {run.directory} after {_epochs(run)}; "
                    "pool runs with the same ReplayOptions.measure_epochs"
                )
        self.queries = [name for name in first.queries if all(name in run.queries for run in self.runs)]

    @property
    def directory(self) -> str:
        """Directories of the runs, in one line."""
        return ", ".join(run.directory for run in self.runs)

    @property
    def manifest(self) -> dict[str, Any]:
        """The entries of the first run's run.json."""
        return self.runs[0].manifest

    @property
    def sensitivity(self) -> str:
        """ "live", "replay" or "both"."""
        return self.runs[0].sensitivity

    def samples(self) -> pl.DataFrame:
        """The sample table, of the first run."""
        return self.runs[0].samples()

    def influence(
        self,
        query: str,
        *,
        subsets: Mapping[str, Any] | Sequence[Any] | None = None,
        groups: str | None = None,
        level: float = 0.95,
        alternative: Alternative = "two-sided",
        correction: Correction = "bh",
        shifts: Shifts = "kriged",
        relative: bool = False,
    ) -> pl.DataFrame:
        """Influence on a query, averaged over the runs.

        Runs differ in their noise σ: before averaging, every μ is carried to the unit of the root mean square σ.

        Args:
            query: a query that all of them recorded, or "self".
            subsets: ids of each subset, by name or in a sequence.
            groups: column of the sample table to group by.
            level: of the intervals.
            alternative: of the p-values.
            correction: of the q-values.
            shifts: as in `Run.influence`.
            relative: adds the column `relative`, the mean over runs; as in `Run.influence`.

        Returns:
            The columns of `Run.influence`.

        Raises:
            InputError: a query that a run does not have, or without what `relative` needs.
        """
        asked = {"subsets": subsets, "groups": groups, "level": level, "shifts": shifts, "relative": relative}
        frames = self.each(query, **asked, shared=query != SELF)
        pooled = pool_frames(frames, reporting=Reporting(level=level, alternative=alternative, correction=correction))
        warn_of_copies(*aligned(frames, "mu", on=pooled.columns[0]))
        if query == SELF:
            return pooled
        about = metadata(pooled) | {"run": self.directory, "sigma": metadata(frames[0])["sigma"]}
        if relative:
            means = pl.concat(frame.select("sample", "relative") for frame in frames).group_by("sample").mean()
            pooled = pooled.join(means, on="sample", how="left", maintain_order="left")
        return attach(pooled, **about)

    def each(self, query: str, **options: Any) -> list[pl.DataFrame]:
        """What every run says by itself, in the unit of all: the root mean square of their noises σ.

        Args:
            query: as in `influence`; "self" stays in each run's own unit, for there is no noise of the measurement.
            **options: of `Run.influence`.

        Returns:
            One influence frame a run.
        """
        frames = [run.influence(query, **options) for run in self.runs]
        return frames if query == SELF else _in_common_unit(frames)

    def __repr__(self) -> str:
        return f"PooledRuns({len(self.runs)} runs: {self.directory}; queries {', '.join(self.queries)})"

    def __str__(self) -> str:
        return f"{self!r}\n{SIGN_CONVENTION}"

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre-wrap">{html.escape(str(self))}</pre>'


def pool(runs: Sequence[Run], query: str, **options: Any) -> pl.DataFrame:
    """Influence averaged over several runs (seeds) of the same training: `PooledRuns(runs).influence(query, …)`.

    Args:
        runs: two or more runs on the same samples, see `PooledRuns`.
        query: a query that all of them recorded.
        **options: of `PooledRuns.influence`.

    Returns:
        The columns of `Run.influence`.

    Raises:
        InputError: see `PooledRuns` and `PooledRuns.influence`.
    """
    return PooledRuns(runs).influence(query, **options)


def open_runs(directories: Sequence[str | os.PathLike[str]]) -> Recorded:
    """Opens one recorded run, or several of one training as one.

    Args:
        directories: local paths or fsspec URLs.

    Returns:
        A `Run` for one directory, `PooledRuns` for more.

    Raises:
        InputError: no directory, or see `PooledRuns`.
        StoreError: see `open_run`.
    """
    if not directories:
        raise InputError("no run was given; name at least one run directory")
    return open_run(directories[0]) if len(directories) == 1 else PooledRuns(directories)


def check_query(run: Recorded, query: str) -> str:
    """The query, which every run must have recorded.

    Raises:
        InputError: a run did not.
    """
    for one in run.runs:
        one.store.check_query(query)
    return query


def _in_common_unit(frames: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """Influence frames in the unit of the root mean square of their noises σ."""
    sigmas = [float(metadata(frame)["sigma"]) for frame in frames]
    common = (sum(sigma**2 for sigma in sigmas) / len(sigmas)) ** 0.5
    scaled = ("mu", "se", "ci_low", "ci_high", "se_shared", "relative")
    return [
        attach(
            frame.with_columns(pl.col([c for c in scaled if c in frame.columns]) * (sigma / common)),
            **metadata(frame) | {"sigma": common},
        )
        for frame, sigma in zip(frames, sigmas, strict=True)
    ]


def check_same_data(runs: Sequence[Run]) -> None:
    """Checks that runs are different ones, on the same samples with the same contents.

    Raises:
        InputError: names the run that is not.
    """
    names = [run.directory for run in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{repeated[0]} is given twice; a run always agrees with itself")
    first = runs[0].samples()
    for run in runs[1:]:
        own = run.samples()
        if own["sample"].dtype != first["sample"].dtype or set(own["sample"]) != set(first["sample"]):
            raise InputError(
                f"{run.directory} has other samples than {runs[0].directory} ({own.height} and {first.height}); "
                "give runs on the same data"
            )
        if "content_hash" not in own.columns or "content_hash" not in first.columns:
            continue
        both = first.select("sample", "content_hash").join(own.select("sample", other="content_hash"), on="sample")
        if changed := both.filter(pl.col("content_hash") != pl.col("other")).height:
            raise InputError(
                f"{changed} samples of {run.directory} have the same ids but other contents than in "
                f"{runs[0].directory}; give runs on the same data"
            )


def warn_of_copies(mu: np.ndarray) -> None:
    """Warns where two runs are one training under two names.

    Args:
        mu: (runs, k) estimates.
    """
    if len(np.unique(mu, axis=0)) < len(mu):
        warnings.warn(
            "two of the runs give every sample exactly the same influence: they are one training under two names, so "
            "their agreement says nothing; train with other seeds",
            FinfluenceWarning,
            stacklevel=4,
        )


def _epochs(run: Run) -> str:
    first, *others = run.measured_epochs
    return f"epoch {first:g}" if not others else f"epochs {first:g} to {others[-1]:g} ({1 + len(others)} times)"


Recorded = Run | PooledRuns

__all__ = ["PooledRuns", "Recorded", "check_query", "check_same_data", "open_runs", "pool", "warn_of_copies"]
