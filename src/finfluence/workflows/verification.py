"""`verify`: retrain with and without a subset of a recorded run, and put measured μ beside predicted μ."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.runs import Truth, retrain_until
from finfluence.runs.pooling import Recorded
from finfluence.signals import open_folder
from finfluence.tradeoff import GaussianInfluence
from finfluence.workflows._retrained import ExecutorName, retraining_of
from finfluence.workflows.cleaning import Cleaning
from finfluence.workflows.recipes import Recipe
from finfluence.workflows.removal import (
    LARGE_CUT,
    VERIFIED_FILE,
    Effect,
    Selection,
    chance_text,
    ids_digest,
    recordings,
    verified_entries,
)


@dataclass(frozen=True)
class Verification:
    """Predicted and measured influence of one subset on one query.

    Attributes:
        query: name of the query.
        name: of the subset, for people.
        size: samples in the subset.
        share: of all training samples.
        predicted: from the recorded run; corrected for the choice where the subset was chosen by the run's estimates.
        measured: from retraining.
        measured_interval: 95 % interval of the measured μ.
        means: mean of the measurement over trainings with the samples and without, in its own unit.
        change_se: standard error of their difference.
        runs: retrainings an arm so far, in pairs of one batch order.
        finished: whether no more retrainings are to come.
        truth: all measurements.
        recordings: recorded runs that the prediction is of.
    """

    query: str
    name: str
    size: int
    share: float
    predicted: GaussianInfluence
    measured: GaussianInfluence
    measured_interval: tuple[float, float]
    means: tuple[float, float]
    change_se: float
    runs: int
    finished: bool
    truth: Truth
    recordings: int = 1

    @property
    def agrees(self) -> bool:
        """Whether the difference lies within the 95 % band of both errors together."""
        gap = abs(self.predicted.mu - self.measured.mu)
        return gap <= 1.96 * float(np.hypot(self.predicted.se, self.measured.se))

    def __str__(self) -> str:
        p_low, p_high = self.predicted.interval(0.95)
        m_low, m_high = self.measured_interval
        raises = "raises" if self.measured.mu > 0 else "lowers"
        chance = self.measured.superiority if self.measured.mu > 0 else 1.0 - self.measured.superiority
        needed = self.measured.retrainings()
        verdict = "agree within their errors" if self.agrees else "differ by more than their errors"
        if not self.agrees and self.share > LARGE_CUT:
            verdict += f" ({self.share:.0%} of the data is far beyond what a first-order prediction is good for)"
        per_arm = (
            "more retrainings than could be done"
            if needed == float("inf")
            else (f"{needed} {'retraining' if needed == 1 else 'retrainings'}")
        )
        source = "the recorded run" if self.recordings == 1 else f"{self.recordings} recorded runs"
        predicted, measured = f"predicted from {source}", f"measured by {self.runs} pairs of retrainings"
        before, after = self.means
        return (
            f"influence of {self.size} samples on {self.query!r}\n"
            f"  {predicted:<36} μ = {self.predicted.mu:+.2f}   95 % {p_low:+.2f} to "
            f"{p_high:+.2f}\n"
            f"  {measured:<36} μ = {self.measured.mu:+.2f}   95 % {m_low:+.2f} to {m_high:+.2f}\n"
            f"  On average the measurement goes from {before:.4g} to {after:.4g}, {after - before:+.3g} ± "
            f"{self.change_se:.2g} (standard error).\n"
            f"  The two μ {verdict}. Retraining without these samples {raises} the measurement with probability "
            f"{chance_text(chance)}; telling it apart takes {per_arm} an arm (5 % level, 80 % power)."
        )

    def _repr_html_(self) -> str:
        from finfluence.workflows.notebook import text_html

        return text_html(str(self))


@dataclass(frozen=True)
class Chosen:
    """A subset that was chosen by the run's own estimates, with what it is then predicted to do.

    Attributes:
        name: for people.
        ids: its samples.
        predicted: corrected for the choice.
        effect: "harmful" or "supporting".
        k: where it is the k strongest rows, a point of the removal curve; else None.
    """

    name: str
    ids: np.ndarray
    predicted: GaussianInfluence
    effect: Effect
    k: int | None = None

    @classmethod
    def of(cls, cleaning: Cleaning) -> Chosen:
        """The rows that a cleaning drops.

        Raises:
            InputError: it drops nothing.
        """
        if cleaning.predicted is None:
            raise InputError(f"nothing to verify: {str(cleaning).splitlines()[0]}")
        ids = cleaning.dropped["sample"].to_numpy()
        k = len(ids) if cleaning.rule.top is not None and cleaning.group is None else None
        name = f"flagged {cleaning.effect} rows" if k is None else f"{k} most {cleaning.effect}"
        return cls(name, ids, cleaning.predicted, cleaning.effect, k)


def curve_points(
    run: Recorded, query: str, ks: Sequence[int | Literal["recommended"]], *, effect: Effect = "harmful"
) -> list[Chosen]:
    """Points of a removal curve, to verify: the k strongest rows for every k.

    Raises:
        InputError: a k that is not between 1 and the number of samples less one, or no recommended cut.
    """
    selection = Selection.of(run, query, effect=effect)
    found: list[Chosen] = []
    for wanted in ks:
        k = selection.recommended if wanted == "recommended" else wanted
        if k == 0:
            raise InputError(f"no row is clear enough to recommend a cut for {query!r}; give numbers of rows")
        if not 0 < k <= min(len(selection.order), selection.frame.height - 1):
            raise InputError(f"cannot remove {k} rows of {selection.frame.height}; leave some to train on")
        positions = selection.order[:k]
        ids = selection.frame["sample"].gather(positions).to_numpy()
        found.append(Chosen(f"{k} most {effect}", ids, selection.influence_of(positions), effect, k))
    return found


def group_points(run: Recorded, query: str, column: str) -> list[Chosen]:
    """Every group of a column, to verify, with its μ of the run.

    Raises:
        InputError: unknown query or column, or one group that is all samples.
    """
    frame, groups = run.influence(query, groups=column), run.runs[0].groups(column)
    return [
        Chosen(f"{column} {label}", groups[label].to_numpy(), GaussianInfluence(mu, se), "harmful")
        for label, mu, se in frame.select("group", "mu", "se").iter_rows()
    ]


def verify(
    run: Recorded,
    ids: Sequence[Any] | np.ndarray | Chosen | Cleaning,
    *,
    name: str = "subset",
    query: str | None = None,
    recipe: Recipe | None = None,
    runs: int = 32,
    precision: float | None = None,
    executor: ExecutorName | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Iterator[Verification]:
    """Retrains in steps and yields the state after each, until the interval is narrow enough or the runs are done.

    Every retraining starts from the parameters that the recorded run started from: a recorded run's μ is conditional
    on its initialisation. They come in pairs, with the samples and without, of one batch order (see `retrain`). What is
    measured is kept in the run's verified.json. Of several runs as one, the prediction is of all, and the first is the
    one that is trained again and keeps what was measured.

    Args:
        run: a run recorded by `train`, or several as one.
        ids: samples to remove. Of a cleaning or of `curve_points` the prediction is the one corrected for the choice;
            of plain ids it is `Run.influence`, right for subsets that were not chosen by the run's own estimates.
        name: of plain ids, for people.
        query: which query; may be left out where there is one.
        recipe: task, model, data and plan; rebuilt from the run's own entry where it is not given.
        runs: pairs of retrainings at most.
        precision: width of the 95 % interval at which to stop; None for all runs.
        executor: of the retraining oracle; the recipe's own by default.
        directory: where retrainings are kept and found again; `verify` in the run's directory by default.
        progress: whether the oracle shows its own progress.

    Yields:
        The state after each step; the last has `finished`.

    Raises:
        InputError: the run carries no recipe and none is given, or is a loop of the user's own; an unknown query, a
            subset that is empty or everything, or data that changed since the run.
        OracleError: retraining cannot be done.
    """
    if isinstance(ids, Cleaning):
        query, ids = query or ids.query, Chosen.of(ids)
    query = _only_query(run, query)
    if not isinstance(ids, Chosen):
        members = np.asarray(ids)
        ids = Chosen(name, members, _estimate(run.influence(query, subsets={"removed": members})), "harmful")
    for (state,) in verify_together(
        run,
        [ids],
        query=query,
        recipe=recipe,
        runs=runs,
        precision=precision,
        executor=executor,
        directory=directory,
        progress=progress,
    ):
        yield state


def verify_together(
    run: Recorded,
    chosen: Sequence[Chosen],
    *,
    query: str,
    recipe: Recipe | None = None,
    runs: int = 32,
    precision: float | None = None,
    executor: ExecutorName | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Iterator[list[Verification]]:
    """`verify` of several subsets at once: they share the trainings with all samples, and each set is trained once.

    Args:
        run: as of `verify`, and so are the others.
        chosen: of `curve_points`, `group_points` or `Chosen.of`.
        query: which query.
        recipe: task, model, data and plan.
        runs: pairs of retrainings of each subset at most.
        precision: width of the widest 95 % interval at which to stop.
        executor: of the retraining oracle.
        directory: where retrainings are kept.
        progress: whether the oracle shows its own progress.

    Yields:
        The states after each step, in the order of `chosen`.

    Raises:
        InputError: see `verify`.
        OracleError: retraining cannot be done.
    """
    first = run.runs[0]
    # One directory keeps the retrainings of every subset that was ever verified, so the name tells which it is.
    arms = {f"removed-{ids_digest(point.ids)}": point for point in chosen}
    epoch = None if len(first.measured_epochs) == 1 else "mean"
    n = first.samples().height
    with retraining_of(
        first,
        recipe,
        subsets={arm: point.ids for arm, point in arms.items()},
        executor=executor,
        directory=directory,
        progress=progress,
    ) as experiment:
        for interim in retrain_until(experiment, query, precision=precision or 1e-9, runs=runs, epoch=epoch):
            rows = {row["subset"]: row for row in interim.influence.iter_rows(named=True)}
            states = [
                Verification(
                    query=query,
                    name=point.name,
                    size=len(point.ids),
                    share=len(point.ids) / n,
                    predicted=point.predicted,
                    measured=GaussianInfluence(rows[arm]["mu"], rows[arm]["se"]),
                    measured_interval=(rows[arm]["ci_low"], rows[arm]["ci_high"]),
                    means=(rows[arm]["mean_with"], rows[arm]["mean_without"]),
                    change_se=rows[arm]["change_se"],
                    # earlier calls may have trained more than this one asked for
                    runs=min(rows[arm]["runs_with"], rows[arm]["runs_without"]),
                    finished=interim.reached or interim.runs >= runs,
                    truth=interim.truth,
                    recordings=len(run.runs),
                )
                for arm, point in arms.items()
            ]
            _record(run, states, list(arms.values()))
            yield states


def verify_groups(run: Recorded, column: str, *, query: str | None = None, **options: Any) -> list[Verification]:
    """Retrains with all samples and without each group of a column.

    Args:
        run: a run recorded by `train`, or several as one.
        column: of the sample table.
        query: which query; may be left out where there is one.
        **options: runs, precision, executor, recipe, directory, progress: see `verify`.

    Returns:
        One verification a group, in the order of `run.influence(query, groups=column)`.

    Raises:
        InputError: see `verify` and `group_points`.
        OracleError: retraining cannot be done, for example because a group leaves less than a batch.
    """
    query = _only_query(run, query)
    *_, last = verify_together(run, group_points(run, query, column), query=query, **options)
    return last


def _only_query(run: Recorded, query: str | None) -> str:
    if query is None and len(run.queries) != 1:
        raise InputError(f"the run has several queries; choose one of {', '.join(run.queries)}")
    return run.queries[0] if query is None else query


def _record(run: Recorded, states: Sequence[Verification], chosen: Sequence[Chosen]) -> None:
    """Writes what was measured so far into the (first) run's verified.json, one entry a query, subset and predictor."""
    first, entries = run.runs[0], [_entry(run, *pair) for pair in zip(states, chosen, strict=True)]

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry.get("query"), entry.get("ids_hash"), tuple(entry.get("recordings", []))

    replaced = {key(entry) for entry in entries}
    others = [entry for entry in verified_entries(first) if key(entry) not in replaced]
    try:
        text = json.dumps([*others, *entries], indent=1, ensure_ascii=False)
        open_folder(first.directory).write(VERIFIED_FILE, text.encode("utf-8"))
    except StoreError as error:
        warnings.warn(f"what was verified is not kept with the run: {error}", FinfluenceWarning, stacklevel=2)


def _entry(run: Recorded, state: Verification, chosen: Chosen) -> dict[str, Any]:
    low, high = state.measured_interval
    return {
        "query": state.query,
        "name": state.name,
        "effect": chosen.effect,
        "size": state.size,
        "ids_hash": ids_digest(chosen.ids),
        "k": chosen.k,
        "predicted": {"mu": state.predicted.mu, "se": state.predicted.se},
        "measured": {"mu": state.measured.mu, "se": state.measured.se, "ci_low": low, "ci_high": high},
        "means": list(state.means),
        "runs": state.runs,
        "recordings": recordings(run),
    }


def _estimate(frame: pl.DataFrame) -> GaussianInfluence:
    return GaussianInfluence(float(frame["mu"][0]), float(frame["se"][0] or 0.0))


__all__ = ["Chosen", "Verification", "curve_points", "group_points", "verify", "verify_groups", "verify_together"]
