"""`leave_out`: a recorded training done again, step by step, without some of its samples.

First order adds up what leaving out each sample by itself would do. Here the recorded steps are taken once more from
the recorded start, with the same batches less the subset, whose places the others of a batch fill: one training for
each subset, whatever its size does. What it measures is put right for the path (`finite_estimates`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from finfluence.errors import InputError, ReplayError
from finfluence.gradients import evaluating, query_gradient
from finfluence.influence import (
    DerivativeError,
    PackedSubsets,
    SampleIndex,
    attach,
    finite_estimates,
    metadata,
    report,
)
from finfluence.runs._progress import ShowProgress, progress
from finfluence.runs._recording import Recording
from finfluence.runs.data import Collate, query_batches
from finfluence.runs.engine import Engine, isolated_rng
from finfluence.runs.estimates import batch_totals
from finfluence.runs.oracle.arms import BASE, make_arm
from finfluence.runs.run import Run, open_run
from finfluence.runs.states import restore_training_state
from finfluence.runs.tasks import Task, measurement
from finfluence.signals import open_folder

FILE = "left_out.json"
_LAST = ("unit", "first_order", "measured_with", "measured_without")
# Of the estimate's error beside placement, set by hand against retraining: see the benchmarks' section on leaving out.
FINITE_ERROR = DerivativeError(path=3.0, joint=0.2)


def leave_out(
    directory: str | os.PathLike[str],
    task: Task,
    model: nn.Module,
    *,
    dataset: Any,
    queries: Mapping[str, Any],
    subsets: Mapping[Any, Any] | None = None,
    groups: str | None = None,
    collate: Collate | None = None,
    show_progress: ShowProgress = "auto",
) -> pl.DataFrame:
    """Influence of subsets by training along the recorded path without each: finite, not first order.

    For subsets that are large, or are most of what the data say about something, and for loops and trainers that
    `verify` cannot set up again. It costs one training for each subset and one with all samples; what was measured is
    kept in the run's left_out.json, and not done twice.

    Args:
        directory: a run whose replay is finished.
        task: as at recording, see `replay`.
        model: as at recording, see `replay`; ends with the parameters of the finished training.
        dataset: as at recording.
        queries: data of each recorded query by name.
        subsets: sample ids of each subset by name.
        groups: or a column of the sample table: every group is one.
        collate: as at recording.
        show_progress: "auto" shows a bar on a terminal's standard error; "never" is silent.

    Returns:
        One row a query (but those whose adjoint diverged) and subset: query, subset (or group), size, mu, se, ci_low,
        ci_high, p_value, q_value (over the query's subsets), unit (of μ: the pooled noise, in the measurement's unit),
        first_order (μ as `Run.influence` has it), measured_with and measured_without (the measurement at the recorded
        end, and without the subset). μ > 0: the subset supports the measured behaviour.

    Raises:
        InputError: neither subsets nor groups, or both; a subset that is empty, the whole set, or names unknown ids;
            other data or queries than recorded; a run that is not replayed.
        ReplayError: the run has no states, or its steps come out otherwise than recorded.
        RecordingError: training without a subset diverges.
    """
    if (subsets is None) == (groups is None):
        raise InputError("give subsets, sample ids by name, or groups, a column of the sample table")
    run = open_run(directory)
    replayed = run.manifest.get("replay", {})
    if not replayed.get("finished"):
        raise InputError(f"{run.directory} has no finished replay, which tells the unit of μ; replay it first")
    scored = [query for query in run.queries if query not in replayed.get("diverged", {})]
    if not scored:
        raise ReplayError(f"the adjoints of all queries of {run.directory} diverged; replay it with other options")
    recording = Recording(open_folder(directory), run.manifest)
    recording.check_data(dataset, queries)
    named, key = (run.groups(groups), "group") if groups is not None else (subsets, "subset")
    packed = SampleIndex(recording.sample_names()).pack(named or {})
    engine = recording.engine(task, model, dataset=dataset, collate=collate)
    walk = _Walk(recording, engine, run, queries=query_batches(queries, collate=collate, device=engine.device))
    try:
        with isolated_rng(engine.device):
            with_all, without = walk.measure(packed, show_progress)
    finally:
        engine.left_out = None
        restore_training_state(model, engine.optimizer, recording.states.load(recording.cuts[-1]))
        engine.optimizer.zero_grad(set_to_none=True)
    frames = [
        _frame(run, query, run.influence(query, subsets=named), packed=packed, before=with_all[k], after=without[:, k])
        for k, query in enumerate(run.queries)
        if query in scored
    ]
    found = pl.concat(frames).rename({"subset": key})
    return attach(found, **metadata(frames[0]) | {"query": None})


class _Walk:
    """The recorded training, done again with samples left out.

    Args:
        recording: what was recorded.
        engine: that takes its steps.
        run: the run.
        queries: one ready batch a query, by name.
    """

    def __init__(self, recording: Recording, engine: Engine, run: Run, *, queries: Mapping[str, Any]) -> None:
        self.recording, self.engine, self.queries = recording, engine, queries
        self.steps = engine.measured_steps(run.measured_epochs)
        # a loop that was taken up again, or another question, is another measurement
        end = recording.states.digest(recording.cuts[-1])
        self._settings = {"epochs": list(run.measured_epochs), "queries": list(queries), "end": end}

    def measure(self, packed: PackedSubsets, show: ShowProgress) -> tuple[np.ndarray, np.ndarray]:
        """What `_train` finds with all samples, and stacked without each subset; kept in the run's directory."""
        kept, n = self._kept(), self.recording.n
        arms = [make_arm(packed.codes_of(row)) for row in range(len(packed.names))]
        wanted = {arm.key: arm for arm in (make_arm(np.empty(0)), *arms) if arm.key not in kept}
        total = len(wanted) * self.engine.total_steps
        with progress("training without", total=total, show=show) as advance:
            for key, arm in wanted.items():
                left_out = np.ones(n, dtype=bool)
                left_out[arm.kept(n)] = False
                kept[key] = self._train(left_out if key != BASE else None, advance).tolist()
                self._keep(kept)
        return np.array(kept[BASE]), np.array([kept[arm.key] for arm in arms])

    def _train(self, left_out: np.ndarray | None, advance: Any) -> np.ndarray:
        """(queries, 2) measurement and norm of its gradient, means over the measured steps."""
        engine, recording = self.engine, self.recording
        restore_training_state(engine.model, engine.optimizer, recording.states.load(recording.cuts[0]))
        engine.left_out = left_out
        found = np.zeros((len(self.queries), 2))
        for batch in engine.batches():
            engine.step(batch)
            advance()
            if batch.step + 1 in self.steps:
                found += np.array([self._look(query) for query in self.queries.values()]) / len(self.steps)
        if left_out is None:
            self._compare()
        return found

    def _look(self, query: Any) -> tuple[float, float]:
        """A query's measurement and the norm of its gradient, where the model is."""
        engine = self.engine

        def measure(model: nn.Module) -> Tensor:
            with engine.autocast():
                return measurement(engine.task, model, query)

        gradient = query_gradient(engine.model, engine.parameters, measure).tensors.values()
        with torch.no_grad(), evaluating(engine.model):
            value = float(measure(engine.model))
        return value, math.sqrt(sum(float(g.double().square().sum()) for g in gradient))

    def _compare(self) -> None:
        recording = self.recording
        dtype = next(iter(self.engine.parameters.values())).dtype
        difference = recording.apart(self.engine.parameters, recording.cuts[-1])
        limit = recording.manifest["replay"]["options"].get("tolerance") or recording.tolerance(dtype)
        if not difference <= limit:
            raise ReplayError(
                f"with all samples the re-executed parameters end {difference:.1e} from the recorded ones (limit "
                f"{limit:.0e}): the data, the model, the task or the machine are not those of the "
                "recording; finfluence.replay names the first step that differs"
            )

    def _kept(self) -> dict[str, list[list[float]]]:
        folder = self.recording.folder
        if FILE not in folder.names():
            return {}
        try:
            content = json.loads(folder.read(FILE))
            return dict(content["measured"]) if content["settings"] == self._settings else {}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder.path(FILE)} is damaged ({error}); delete it and measure again") from error

    def _keep(self, measured: Mapping[str, list[list[float]]]) -> None:
        content = {"settings": self._settings, "measured": dict(measured)}
        self.recording.folder.write(FILE, json.dumps(content).encode())


def _frame(
    run: Run, query: str, first: pl.DataFrame, *, packed: PackedSubsets, before: np.ndarray, after: np.ndarray
) -> pl.DataFrame:
    """One query's rows.

    Args:
        run: the run.
        query: the query.
        first: what first order says of the same subsets.
        packed: k subsets.
        before: (2,) measurement and norm of its gradient with all samples.
        after: (k, 2) without each subset.
    """
    found = finite_estimates(
        run.table(query),
        batch_totals(run.store, query, "signals"),
        packed=packed,
        change=after[:, 0] - before[0],
        sensitivity=after[:, 1] / before[1],
        error=FINITE_ERROR,
    )
    estimates = pl.DataFrame(report(found.mu, found.se, null=found.null))
    frame = first.select(pl.lit(query).alias("query"), "subset", "size", first_order="mu")
    frame = pl.concat([frame, estimates], how="horizontal").with_columns(
        unit=pl.Series(found.unit),
        measured_with=pl.lit(before[0]),
        measured_without=pl.Series(after[:, 0]),
    )
    return attach(frame.select(pl.exclude(*_LAST), *_LAST), **metadata(first) | {"estimator": "finite removal"})
