"""`verify`: retrain with and without a subset of a recorded run, and put measured μ beside predicted μ."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from torch import nn

from finfluence.errors import InputError
from finfluence.runs import Plan, Retraining, Run, Truth, retrain_until
from finfluence.tradeoff import GaussianInfluence
from finfluence.workflows.recipes import Recipe, load_recipe

ExecutorName = Literal["ensemble", "processes", "ray"]

# Share of the data above which removing a subset is no small change.
_LARGE = 0.05


@dataclass(frozen=True)
class Verification:
    """Predicted and measured influence of one subset on one query.

    Attributes:
        query: name of the query.
        size: samples in the subset.
        share: of all training samples.
        predicted: from the recorded run.
        measured: from retraining.
        measured_interval: 95 % interval of the measured μ.
        runs: retrainings an arm so far.
        finished: whether no more retrainings are to come.
        truth: all measurements.
    """

    query: str
    size: int
    share: float
    predicted: GaussianInfluence
    measured: GaussianInfluence
    measured_interval: tuple[float, float]
    runs: int
    finished: bool
    truth: Truth

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
        if not self.agrees and self.share > _LARGE:
            verdict += f" ({self.share:.0%} of the data is far beyond what a first-order prediction is good for)"
        per_arm = (
            "more retrainings than could be done"
            if needed == float("inf")
            else (f"{needed} {'retraining' if needed == 1 else 'retrainings'}")
        )
        measured = f"measured by {self.runs} + {self.runs} retrainings"
        return (
            f"influence of {self.size} samples on {self.query!r}\n"
            f"  {'predicted from the recorded run':<36} μ = {self.predicted.mu:+.2f}   95 % {p_low:+.2f} to "
            f"{p_high:+.2f}\n"
            f"  {measured:<36} μ = {self.measured.mu:+.2f}   95 % {m_low:+.2f} to {m_high:+.2f}\n"
            f"  The two {verdict}. Retraining without these samples {raises} the measurement with probability "
            f"{chance:.2f}; telling it apart takes {per_arm} an arm (5 % level, 80 % power)."
        )


def verify(
    run: Run,
    ids: Sequence[Any] | np.ndarray,
    *,
    query: str | None = None,
    recipe: Recipe | None = None,
    runs: int = 64,
    precision: float | None = None,
    executor: ExecutorName = "ensemble",
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Iterator[Verification]:
    """Retrains in steps and yields the state after each, until the interval is narrow enough or the runs are done.

    Every retraining starts from the parameters that the recorded run started from: a recorded run's μ is conditional
    on its initialisation.

    Args:
        run: a run recorded by `train`.
        ids: samples to remove.
        query: which query; may be left out where there is one.
        recipe: task, model, data and plan; rebuilt from the run's own entry where it is not given.
        runs: retrainings an arm at most.
        precision: width of the 95 % interval at which to stop; None for all runs.
        executor: of the retraining oracle.
        directory: where retrainings are kept and found again; `verify` in the run's directory by default.
        progress: whether the oracle shows its own progress.

    Yields:
        The state after each step; the last has `finished`.

    Raises:
        InputError: the run carries no recipe and none is given, an unknown query, a subset that is empty or everything.
        OracleError: retraining cannot be done.
    """
    recipe = recipe or run_recipe(run)
    if query is None:
        if len(run.queries) != 1:
            raise InputError(f"the run has several queries; choose one of {', '.join(run.queries)}")
        query = run.queries[0]
    members = np.asarray(ids)
    predicted = _estimate(run.influence(query, subsets={"removed": members}))
    # One directory keeps the retrainings of every subset that was ever verified, so the name tells which it is.
    name = f"removed-{hashlib.sha256(repr(sorted(members.tolist())).encode()).hexdigest()[:12]}"
    plan = Plan.from_dict(run.manifest["plan"])
    experiment = Retraining(
        recipe.task,
        _from_recorded_start(run, recipe.make_model),
        recipe.dataset,
        recipe.queries,
        subsets={name: members},
        optimizer=plan.optimizer,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        directory=directory or f"{str(run.directory).rstrip('/')}/verify",
        initialisation="fixed",
        executor=executor,
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
        for interim in retrain_until(experiment, query, precision=precision or 1e-9, runs=runs):
            frame = interim.influence.filter(pl.col("subset") == name)
            yield Verification(
                query=query,
                size=len(members),
                share=len(members) / run.samples().height,
                predicted=predicted,
                measured=_estimate(frame),
                measured_interval=(frame["ci_low"][0], frame["ci_high"][0]),
                # earlier calls may have trained more than this one asked for
                runs=min(frame["runs_with"][0], frame["runs_without"][0]),
                finished=interim.reached or interim.runs >= runs,
                truth=interim.truth,
            )


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


def flagged_samples(run: Run, query: str, *, fdr: float = 0.05) -> np.ndarray:
    """Ids of the samples that are harmful for a query at a false-discovery rate.

    Raises:
        InputError: no sample is.
    """
    frame = run.influence(query, alternative="harmful").filter(pl.col("q_value") <= fdr)
    if frame.is_empty():
        raise InputError(
            f"no sample is harmful for {query!r} at a false-discovery rate of {fdr:.0%}; pool several runs or look at "
            "groups"
        )
    return frame["sample"].to_numpy()


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


__all__ = ["Verification", "flagged_samples", "run_recipe", "verify"]
