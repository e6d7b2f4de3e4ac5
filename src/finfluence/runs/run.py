"""`Run`: a recorded run on disk, and every question that can be asked about it."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from finfluence.errors import InputError, ReplayError
from finfluence.influence import (
    Alternative,
    Budget,
    Correction,
    InfluenceTable,
    Reporting,
    SampleIndex,
    attach,
    metadata,
    relative_influence,
    self_influence,
    squared_lengths,
    two_stage_samples,
    two_stage_subsets,
    watched_frame,
)
from finfluence.runs._adjoints import read_adjoints
from finfluence.runs._facade import Facade
from finfluence.runs.estimates import Shifts, influence_table
from finfluence.signals import SELF, SignalArrays, SignalStore, SignalTable, arrays, open_folder
from finfluence.tradeoff import SIGN_CONVENTION

RunEstimator = Literal["gaussian", "tracin", "max", "median", "two-stage-gaussian", "clopper-pearson"]


class Run(Facade):
    """A recorded run, read from its directory.

    Attributes:
        directory: its path or URL.
        manifest: the entries of run.json.
        queries: names of its queries.
        store: its signal store.
    """

    def __init__(self, store: SignalStore) -> None:
        self.store = store
        self.directory, self.manifest, self.queries = store.directory, store.manifest, store.queries
        self._tables: dict[tuple[Any, ...], Any] = {}

    @property
    def name(self) -> str:
        """The last part of its directory."""
        return Path(self.directory).name

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run itself, where `PooledRuns` has several."""
        return (self,)

    @property
    def sensitivity(self) -> str:
        """ "live", "replay" or "both"."""
        return str(self.manifest.get("sensitivity", "live"))

    def samples(self) -> pl.DataFrame:
        """The sample table: sample, and whatever columns were recorded with it."""
        return self.store.samples().collect()

    def steps(self) -> pl.DataFrame:
        """The step table, one row an optimizer step."""
        return self.store.steps().sort("step").collect()

    def signals(self, *, table: SignalTable = "signals") -> pl.LazyFrame:
        """The signals: step, sample, one float32 column a query, in units of the query's measurement."""
        return self.store.signals(table)

    def adjoints(self) -> pl.DataFrame:
        """How a replay went: step, query, norm of its adjoint before the step, relative residual of the identity."""
        return read_adjoints(open_folder(self.directory))

    def groups(self, column: str) -> dict[Any, pl.Series]:
        """Sample ids of every group of a column of the sample table, by its label, in the labels' order.

        Samples with a null label are in no group.

        Raises:
            InputError: unknown column.
        """
        frame = self.samples().with_columns(self._group_labels(column).alias("group")).drop_nulls("group")
        parts = frame.sort("group", maintain_order=True).group_by(["group"], maintain_order=True)
        return {label: part["sample"] for (label,), part in parts}

    def influence(
        self,
        query: str,
        *,
        subsets: Mapping[str, Any] | Sequence[Any] | None = None,
        groups: str | None = None,
        estimator: RunEstimator = "gaussian",
        sensitivity: Literal["run", "live"] = "run",
        level: float = 0.95,
        alternative: Alternative = "two-sided",
        correction: Correction = "bh",
        budget: Budget | None = None,
        shifts: Shifts = "kriged",
        derivative_error: float = 1.0,
        relative: bool = False,
        shared: bool = False,
    ) -> pl.DataFrame:
        """Influence on a query: one row a sample, or a subset, or a group.

        μ > 0: the samples support the measured behaviour (removing them raises the measured loss); μ < 0: they work
        against it. The frame says so in its metadata, `frame.finfluence.meta`.

        Args:
            query: name of a recorded query; "self" for every sample's influence on its own loss, recorded with
                train(self_influence="record" or "all").
            subsets: ids of each subset by name; names alone, as a sequence, for subsets watched at recording.
            groups: column of the sample table to group by.
            estimator: "gaussian" (shift over noise), "tracin" (plain sum, units of the measurement), or f-INE's
                two-stage test with its rule: "max" (the paper's, biased upward), "median", "two-stage-gaussian",
                "clopper-pearson".
            sensitivity: "live" for the live signals beside a replay.
            level: of the intervals.
            alternative: of the p-values: "two-sided", "harmful" (μ < 0) or "supporting" (μ > 0).
            correction: q-values by Benjamini–Hochberg ("bh") or Benjamini–Yekutieli ("by").
            budget: removal under equal "steps" or equal "epochs"; the sampler's own by default.
            shifts: of the gaussian estimator on batch signals: "kriged" predicts from the noise panel what a sample's
                signals were where no batch held it, and corrects the panel's noise; "plain" sums what was recorded.
                Where a run has no panel, has full signals or another sampler than shuffling, both are the same.
            derivative_error: how many times standard errors count what they usually do for other paths of the training
                and for removal being no small change (see `finfluence.influence.DerivativeError`): 0 makes them
                conditional on this run's path and of first order. Live signals count nothing.
            relative: adds the column `relative`, μ at the median length of gradient (see
                `finfluence.influence.relative_influence`): rows that are about the query come first by it, where μ also
                puts those first that weigh much in everything. For single samples of a run with self-influence.

            shared: adds the column `se_shared`, the part of se that other runs of this training have in common with it,
                which averaging over runs does not make less.

        Returns:
            Columns sample (or subset and size, or group and size), mu, se, ci_low, ci_high, p_value, q_value, and
            se_shared and relative where they were asked for. Intervals have errors relative to μ in them; p-values
            are against μ = 0, where there are none.

        Raises:
            InputError: unknown query, estimator or column; a subset that is empty, the whole set, or names unknown ids.
            ReplayError: the query's adjoint diverged in the replay.
        """
        reporting = Reporting(level=level, alternative=alternative, correction=correction)
        if query == SELF:
            if subsets is not None or groups is not None or estimator != "gaussian" or relative:
                raise InputError(
                    'query "self" scores single samples on their own loss; it takes no subsets, groups or estimator, '
                    "and is not relative"
                )
            return self._self_influence(reporting)
        if relative:
            if subsets is not None or groups is not None:
                raise InputError("relative influence is one of single samples; leave out subsets and groups")
            own = self._self_signals()
            frame = self.influence(
                query,
                estimator=estimator,
                sensitivity=sensitivity,
                level=level,
                alternative=alternative,
                correction=correction,
                budget=budget,
                shifts=shifts,
                derivative_error=derivative_error,
                shared=shared,
            )
            return self._with_relative(frame, own)
        self.store.check_query(query)
        if estimator not in get_args(RunEstimator):
            raise InputError(f"unknown estimator {estimator!r}; choose one of {', '.join(get_args(RunEstimator))}")
        if subsets is not None and groups is not None:
            raise InputError("give subsets or groups, not both")
        table = self._signal_table(sensitivity)
        diverged = self.manifest.get("replay", {}).get("diverged", {})
        if table == "signals" and query in diverged:
            raise ReplayError(f"{diverged[query]}; then replay again with finfluence.replay(..., options=...)")
        if estimator not in ("gaussian", "tracin"):
            rule: Any = "gaussian" if estimator == "two-stage-gaussian" else estimator
            return self._two_stage(query, subsets, groups, rule=rule, reporting=reporting, table=table)
        if subsets is not None and not isinstance(subsets, Mapping) and any(isinstance(s, str) for s in subsets):
            raise InputError(
                f'the {estimator} estimator takes ids, for example subsets={{"web": ids}}; names alone are for watched '
                "subsets and the two-stage estimators"
            )
        found = self._table(query, table, estimator, budget, shifts=shifts, error=derivative_error)
        found = replace(
            found.with_reporting(level=level, alternative=alternative, correction=correction), shared=shared
        )
        if subsets is not None:
            frame = found.subsets(subsets)
        elif groups is not None:
            frame = found.groups(self._group_labels(groups))
        else:
            frame = found.samples()
        if table == "signals" and len(self.measured_epochs) > 1:
            return attach(frame, **metadata(frame), measured_epochs=list(self.measured_epochs))
        return frame

    def leave_out(self, *, subsets: Mapping[Any, Any] | None = None, groups: str | None = None) -> pl.DataFrame:
        """Influence of subsets or groups by training along the recorded path without each: see `finfluence.leave_out`.

        Args:
            subsets: sample ids by name.
            groups: or a column of the sample table.

        Raises:
            InputError: the run carries no recipe, or is a loop of the user's own; see `finfluence.leave_out`.
        """
        from finfluence.workflows._retrained import left_out

        return left_out(self, subsets=subsets, groups=groups)

    def _signal_table(self, sensitivity: str) -> SignalTable:
        if sensitivity not in ("run", "live"):
            raise InputError(f"unknown sensitivity {sensitivity!r}; choose run or live")
        if self.sensitivity == "live":
            return "signals"
        if sensitivity == "run":
            if not self.manifest.get("replay", {}).get("finished"):
                raise InputError(
                    f"the replay of {self.directory} is not finished; finish it with train(..., exist='resume') or "
                    "finfluence.replay, or ask for sensitivity='live' if the run recorded both"
                )
            return "signals"
        if not self.store.has("live"):
            raise InputError(
                f"{self.directory} has no live signals beside its replay; record it with sensitivity='both'"
            )
        return "live"

    def table(self, query: str) -> InfluenceTable:
        """What `influence` reads of the run's own signals by default, made once: totals and noise of a query."""
        return self._table(query, "signals", "gaussian", None, shifts="kriged")

    def _table(
        self,
        query: str,
        table: SignalTable,
        estimator: Any,
        budget: Budget | None,
        *,
        shifts: Shifts = "plain",
        error: float = 1.0,
    ) -> Any:
        key = (query, table, estimator, budget, shifts, error)
        if key not in self._tables:
            self._tables[key] = influence_table(
                self.store,
                query,
                table=table,
                estimator=estimator,
                budget=budget,
                shifts=shifts,
                derivative_error=error,
            )
        return self._tables[key]

    def _group_labels(self, column: str) -> pl.Series:
        samples = self.samples()
        if column not in samples.columns or column == "sample":
            known = [c for c in samples.columns if c not in ("sample", "content_hash")]
            raise InputError(
                f"unknown group column {column!r}; the sample table has {', '.join(known) or 'no further columns'}"
            )
        return samples[column]

    def _two_stage(
        self, query: str, subsets: Any, groups: str | None, *, rule: Any, reporting: Reporting, table: SignalTable
    ) -> pl.DataFrame:
        meta = (("query", query), ("run", self.directory))
        if subsets is not None and not isinstance(subsets, Mapping):
            watch = self.store.watch().collect()
            return watched_frame(
                watch, list(subsets), query=query, rule=rule, reporting=reporting, sizes=self._watched_sizes()
            )
        found = self._table(query, table, "tracin", None)
        signals = arrays(self.store, query, table=table)
        flat: dict[str, Any] = {"step": signals.steps, "code": signals.codes, "value": signals.values}
        key = "subset"
        if groups is not None:
            subsets, key = self.groups(groups), "group"
        if subsets is None:
            return two_stage_samples(found.index, **flat, rule=rule, reporting=reporting, meta=meta)
        return two_stage_subsets(found.index, subsets, **flat, rule=rule, reporting=reporting, key=key, meta=meta)

    @property
    def measured_epochs(self) -> tuple[float, ...]:
        """Epochs after which the queries were measured; influence is on the mean (see `ReplayOptions`)."""
        asked = (self.manifest.get("replay") or {}).get("measured_epochs")
        return tuple(asked or [int(self.manifest.get("epochs", 1))])

    def _watched_sizes(self) -> dict[str, int]:
        return {name: len(members) for name, members in self.manifest.get("watch", {}).items()}

    def _self_signals(self) -> SignalArrays:
        if not self.store.has("self"):
            raise InputError(
                f'{self.directory} has no self-influence; record it with train(..., self_influence="record"), or '
                '"all", or add it by replay(..., self_influence="all")'
            )
        return arrays(self.store, SELF, table="self")

    def _with_relative(self, frame: pl.DataFrame, own: SignalArrays) -> pl.DataFrame:
        """An influence frame of all samples with the column `relative`."""
        period = own.steps
        if self.manifest.get("self_influence") != "all":  # a step has its batch alone, an epoch everyone
            table = self.store.steps().select("step", "epoch").sort("step").collect()
            period = table["epoch"].to_numpy()[np.searchsorted(table["step"].to_numpy(), own.steps)]
        lengths = squared_lengths(own.codes, own.values, period=period, n_samples=frame.height)
        ratio = pl.Series("relative", relative_influence(frame["mu"].fill_null(np.nan).to_numpy(), lengths))
        return attach(frame.with_columns(ratio.fill_nan(None)), **metadata(frame))

    def _self_influence(self, reporting: Reporting) -> pl.DataFrame:
        own = self._self_signals()
        index = SampleIndex(self.samples()["sample"])
        # under SGD every self-signal has one sign, so 0 would be rejected for all samples
        return self_influence(
            index, own.steps, code=own.codes, value=own.values, reference="median", reporting=reporting
        )

    def __repr__(self) -> str:
        state = "" if self.store.status == "finished" else f", {self.store.status}"
        return (
            f"Run({self.directory!r}: {self.store.n_steps} steps, {self.manifest.get('n_samples', '?')} samples, "
            f"queries {', '.join(self.queries)}, {self.sensitivity}{state})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{SIGN_CONVENTION}"

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre-wrap">{html.escape(str(self))}</pre>'


def open_run(directory: str | os.PathLike[str], *, partial: bool = False) -> Run:
    """Opens a recorded run.

    Args:
        directory: local path or fsspec URL.
        partial: read the finished steps of a run that is still being written.

    Returns:
        The run.

    Raises:
        StoreError: there is no run, it is still being written, or a file is truncated or foreign.
    """
    return Run(SignalStore.open(directory, partial=partial))
