"""`verify`: retrain with and without a subset of a recorded run, and put measured μ beside predicted μ."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from torch import nn

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.runs import Plan, Retraining, Run, Truth, retrain_until
from finfluence.runs.pooling import Recorded
from finfluence.runs.sources import dataset_hashes
from finfluence.signals import open_folder
from finfluence.tradeoff import GaussianInfluence
from finfluence.workflows._cut_files import matching_rows, read_origin, source_of
from finfluence.workflows.cleaning import Cleaning
from finfluence.workflows.recipes import Recipe, load_recipe
from finfluence.workflows.removal import (
    LARGE_CUT,
    VERIFIED_FILE,
    Effect,
    Selection,
    chance_text,
    recordings,
    verified_entries,
)

ExecutorName = Literal["ensemble", "processes", "ray"]


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
            f"  On average the measurement goes from {before:.4g} to {after:.4g}, {after - before:+.2g} ± "
            f"{self.change_se:.1g} (standard error).\n"
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
    asked, run = run, run.runs[0]
    _check_planned(run)
    recipe = recipe or run_recipe(run)
    if isinstance(ids, Cleaning):
        query, ids = query or ids.query, Chosen.of(ids)
    if query is None:
        if len(run.queries) != 1:
            raise InputError(f"the run has several queries; choose one of {', '.join(run.queries)}")
        query = run.queries[0]
    check_unchanged(run, recipe)
    if not isinstance(ids, Chosen):
        members = np.asarray(ids)
        ids = Chosen(name, members, _estimate(asked.influence(query, subsets={"removed": members})), "harmful")
    members = ids.ids
    digest = hashlib.sha256(repr(sorted(members.tolist())).encode()).hexdigest()[:12]
    # One directory keeps the retrainings of every subset that was ever verified, so the name tells which it is.
    arm = f"removed-{digest}"
    plan = Plan.from_dict(run.manifest["plan"])
    measured = run.measured_epochs
    place, epoch = ("verify", None) if len(measured) == 1 else ("verify-mean", "mean")
    experiment = Retraining(
        recipe.task,
        _from_recorded_start(run, recipe.make_model),
        recipe.dataset,
        recipe.queries,
        subsets={arm: members},
        optimizer=plan.optimizer,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        directory=directory or f"{str(run.directory).rstrip('/')}/{place}",
        measure_epochs=measured,
        initialisation="fixed",
        executor=executor or recipe.executor,
        collate=recipe.collate,
        # other batch orders than the recorded run's own, so that prediction and truth are independent
        seed=plan.seed + 1,
        sampler=plan.sampler,
        schedule=plan.schedule,
        clip_norm=plan.clip_norm,
        accumulation=plan.accumulation,
        precision=plan.precision,
        ids=run.samples()["sample"].to_numpy(),
        progress=progress,
    )
    with experiment:
        for interim in retrain_until(experiment, query, precision=precision or 1e-9, runs=runs, epoch=epoch):
            frame = interim.influence.filter(pl.col("subset") == arm)
            state = Verification(
                query=query,
                name=ids.name,
                size=len(members),
                share=len(members) / run.samples().height,
                predicted=ids.predicted,
                measured=_estimate(frame),
                measured_interval=(frame["ci_low"][0], frame["ci_high"][0]),
                means=(frame["mean_with"][0], frame["mean_without"][0]),
                change_se=frame["change_se"][0],
                # earlier calls may have trained more than this one asked for
                runs=min(frame["runs_with"][0], frame["runs_without"][0]),
                finished=interim.reached or interim.runs >= runs,
                truth=interim.truth,
                recordings=len(asked.runs),
            )
            _record(asked, state, chosen=ids, digest=digest)
            yield state


def _check_planned(run: Run) -> None:
    """Refuses a loop that was somebody else's, which only they can do without some of its rows.

    Raises:
        InputError: it was.
    """
    if "loop" in run.manifest:
        raise InputError(
            f"{run.name} is a loop of your own, whose schedule finfluence did not set; train it again without these "
            "rows and compare the losses (finfluence.compare), or describe it to finfluence.retrain"
        )


def check_unchanged(run: Run, recipe: Recipe) -> None:
    """Refuses data that are no longer what the run was trained on.

    Raises:
        InputError: another number of samples, or items with another content than recorded.
    """
    samples = run.samples()
    if len(recipe.dataset) != samples.height:
        raise InputError(
            f"the data have {len(recipe.dataset)} samples now, the run was trained on {samples.height}; "
            "record a run on the new data"
        )
    source = source_of(run, data=None, id_column=None)
    if source is not None:
        matching_rows(run, read_origin(source), source)
        return
    if run.manifest.get("content") not in ("items", "rows"):
        return
    found = dataset_hashes(recipe.dataset)
    if found is None:
        return
    ids, expected = samples["sample"].to_list(), samples["content_hash"].to_list()
    changed = [i for i, now, then in zip(ids, found, expected, strict=True) if now != then]
    if changed:
        raise InputError(
            f"{len(changed)} of {len(ids)} samples changed since the run, the first is {changed[0]!r}; "
            "record a run on the new data"
        )


def _record(run: Recorded, state: Verification, *, chosen: Chosen, digest: str) -> None:
    """Writes what was measured so far into the (first) run's verified.json, one entry a query, subset and predictor."""
    low, high = state.measured_interval
    entry = {
        "query": state.query,
        "name": state.name,
        "effect": chosen.effect,
        "size": state.size,
        "ids_hash": digest,
        "k": chosen.k,
        "predicted": {"mu": state.predicted.mu, "se": state.predicted.se},
        "measured": {"mu": state.measured.mu, "se": state.measured.se, "ci_low": low, "ci_high": high},
        "means": list(state.means),
        "runs": state.runs,
        "recordings": recordings(run),
    }
    keys = ("query", "ids_hash", "recordings")
    first = run.runs[0]
    others = [e for e in verified_entries(first) if any(e.get(key, []) != entry[key] for key in keys)]
    try:
        text = json.dumps([*others, entry], indent=1, ensure_ascii=False)
        open_folder(first.directory).write(VERIFIED_FILE, text.encode("utf-8"))
    except StoreError as error:
        warnings.warn(f"what was verified is not kept with the run: {error}", FinfluenceWarning, stacklevel=2)


def run_recipe(run: Run) -> Recipe:
    """The recipe that a run was recorded with.

    Raises:
        InputError: it carries none.
    """
    reference = run.manifest.get("recipe")
    if not reference:
        raise InputError(
            f"{run.directory} does not say how its data and model are made; record it with "
            'train(..., recipe={"function": "module:function"}), or call finfluence.workflows.verify with a recipe'
        )
    return load_recipe(reference)


def _estimate(frame: pl.DataFrame) -> GaussianInfluence:
    return GaussianInfluence(float(frame["mu"][0]), float(frame["se"][0] or 0.0))


class _RecordedStart:
    """Makes models that start where the recorded run started."""

    def __init__(self, make_model: Callable[[int], nn.Module], seed: int) -> None:
        self.make_model, self.seed = make_model, seed

    def __call__(self, seed: int) -> nn.Module:
        del seed
        return self.make_model(self.seed)


def _from_recorded_start(run: Run, make_model: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return _RecordedStart(make_model, int(run.manifest["seed"] or 0))


__all__ = ["Chosen", "Verification", "check_unchanged", "curve_points", "run_recipe", "verify"]
