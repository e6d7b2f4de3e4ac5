"""The retraining oracle: train with and without each subset, many times, and measure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any, get_args

import numpy as np
import polars as pl
from torch import nn

from finfluence.errors import InputError, OracleError
from finfluence.influence.subsets import Ids, SampleIndex
from finfluence.runs.data import Collate, dataset_size, query_batches
from finfluence.runs.oracle import fingerprint
from finfluence.runs.oracle._progress import TrainingProgress
from finfluence.runs.oracle.arms import BASE, Orders, TrainingBudget, make_arm, make_arms, run_seed
from finfluence.runs.oracle.executors import Executor, ExecutorName, Session, make_executor
from finfluence.runs.oracle.problem import Initialisation, Job, Outcome, Problem, fresh_model
from finfluence.runs.oracle.store import TruthStore, check_queries
from finfluence.runs.oracle.truth import Truth
from finfluence.runs.plan import OptimizerConfig, Plan, Precision, Schedule
from finfluence.runs.sampling import Sampler
from finfluence.runs.tasks import Task

_FLUSH_SECONDS = 1.0
_HOPELESS = 8


class Retraining:
    """An experiment under way: `extend` trains up to a number of runs an arm and may be called again with more.

    Use it as a context manager, so that workers end. The arguments are those of `retrain`, which is one `extend`.

    Attributes:
        problem: what all trainings share.
    """

    def __init__(
        self,
        task: Task,
        make_model: Callable[[int], nn.Module],
        dataset: Any,
        queries: Mapping[str, Any],
        *,
        subsets: Mapping[str, Ids],
        optimizer: OptimizerConfig,
        epochs: int,
        batch_size: int,
        directory: str | os.PathLike[str],
        initialisation: Initialisation = "fixed",
        executor: ExecutorName | Executor = "ensemble",
        seed: int = 0,
        sampler: Sampler | None = None,
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        accumulation: int = 1,
        precision: Precision = "float32",
        ids: Ids | None = None,
        measure_epochs: Sequence[float] = (),
        budget: TrainingBudget = "steps",
        orders: Orders = "paired",
        collate: Collate | None = None,
        device: str | None = None,
        progress: bool = True,
    ) -> None:
        _check_choice("initialisation", initialisation, get_args(Initialisation))
        _check_choice("budget", budget, get_args(TrainingBudget))
        _check_choice("orders", orders, get_args(Orders))
        self._executor = make_executor(executor)
        n = dataset_size(dataset)
        index = SampleIndex(n if ids is None else ids)
        if len(index) != n:
            raise InputError(f"ids names {len(index)} samples, the dataset has {n}; give one id a sample")
        plan = Plan(
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            sampler=sampler or Sampler(),
            schedule=schedule or Schedule(),
            clip_norm=clip_norm,
            accumulation=accumulation,
            precision=precision,
        )
        plan.steps(n)  # checks the batch size against the data
        batches = query_batches(queries, collate=collate)
        check_queries(batches)
        self._arms = make_arms(subsets, index, batch_size)
        self.problem = Problem(
            task=task,
            make_model=make_model,
            dataset=dataset,
            queries=batches,
            plan=plan,
            arms={BASE: make_arm(np.empty(0, dtype=np.int64))} | {arm.key: arm for arm in self._arms.values()},
            n=n,
            initialisation=initialisation,
            budget=budget,
            orders=orders,
            measured=_measured(measure_epochs, epochs),
            collate=collate,
            device=device,
        )
        self._progress = progress
        self._session: Session | None = None
        self._failed: set[Job] = set()  # tried in this session; another one tries them again
        self.store = TruthStore(directory)
        self._manifest = self.store.begin(
            _experiment(self.problem),
            {
                name: {"arm": arm.key, "ids": index.ids.gather(arm.removed).to_list()}
                for name, arm in self._arms.items()
            },
        )

    @property
    def subset_names(self) -> tuple[str, ...]:
        """Names of this experiment's own subsets."""
        return tuple(self._arms)

    def extend(self, runs: int) -> Truth:
        """Trains what is missing of runs 0 to runs - 1 of every arm.

        Args:
            runs: trainings an arm, those in the directory included.

        Returns:
            Everything that the directory holds now.

        Raises:
            OracleError: the executor cannot run the problem, or the first trainings all fail in the same way.
        """
        if not isinstance(runs, int) or runs < 1:
            raise InputError(f"runs must be a positive integer, got {runs!r}")
        names = list(self.problem.queries)
        stored = self.store.trainings(names).filter(pl.col("status") == "finished")
        done = set(stored.select("arm", "run").iter_rows())
        jobs = [
            Job(arm, run, run_seed(self.problem.plan.seed, arm, run, orders=self.problem.orders))
            for run in range(runs)
            for arm in self.problem.arms
            if (arm, run) not in done
        ]
        if jobs := [job for job in jobs if job not in self._failed]:
            if self._session is None:
                self._session = self._executor.open(self.problem)
            self._train(self._session, jobs)
            self.store.compact(names)
        return Truth(self._manifest, self.store.trainings(names))

    def _train(self, session: Session, jobs: list[Job]) -> None:
        steps = sum(self.problem.checkpoints(job.arm)[-1] for job in jobs)
        pending: list[Outcome] = []
        errors: list[str] = []
        flushed, finished = 0.0, 0
        with TrainingProgress(
            enabled=self._progress, trainings=len(jobs), steps=steps, where=session.describe(jobs)
        ) as progress:
            try:
                for outcomes in session.run(jobs, tick=progress.tick):
                    pending += outcomes
                    failures = [outcome for outcome in outcomes if outcome.error is not None]
                    self._failed |= {outcome.job for outcome in failures}
                    errors += [str(outcome.error) for outcome in failures]
                    finished += len(outcomes) - len(failures)
                    progress.add(len(outcomes) - len(failures), len(failures))
                    # quick trainings share a part, slow ones are too dear to wait for the next
                    slow = any(outcome.seconds > _FLUSH_SECONDS for outcome in outcomes)
                    if slow or time.monotonic() - flushed > _FLUSH_SECONDS:
                        self._flush(pending)
                        pending, flushed = [], time.monotonic()
                    if not finished and len(errors) >= _HOPELESS and len(set(errors)) == 1:
                        raise OracleError(f"the first {len(errors)} trainings all failed: {errors[0]}")
            finally:
                self._flush(pending)

    def _flush(self, outcomes: list[Outcome]) -> None:
        if outcomes:
            self.store.append(outcomes, queries=list(self.problem.queries), epochs=self.problem.measured)

    def close(self) -> None:
        """Ends the executor's workers; what was trained is stored."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Retraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def retrain(
    task: Task,
    make_model: Callable[[int], nn.Module],
    dataset: Any,
    queries: Mapping[str, Any],
    *,
    subsets: Mapping[str, Ids],
    optimizer: OptimizerConfig,
    epochs: int,
    batch_size: int,
    directory: str | os.PathLike[str],
    runs: int = 128,
    initialisation: Initialisation = "fixed",
    executor: ExecutorName | Executor = "ensemble",
    seed: int = 0,
    sampler: Sampler | None = None,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    accumulation: int = 1,
    precision: Precision = "float32",
    ids: Ids | None = None,
    measure_epochs: Sequence[float] = (),
    budget: TrainingBudget = "steps",
    orders: Orders = "paired",
    collate: Collate | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Truth:
    """Trains `runs` models on all samples and `runs` without each subset, and measures every query on each.

    Every training is stored when it ends. Called again, with the same arguments or with more runs or subsets, it does
    only what is missing; failed trainings are tried again. The same seed gives the same trainings with any executor.

    Args:
        task: losses of a batch and measurement of a query; models are measured in evaluation mode.
        make_model: called with a seed, returns a fresh model.
        dataset: map-style dataset of n samples.
        queries: as of `train`: a map-style dataset, a ready batch, a Contrast or a function of the model by name.
        subsets: sample ids by name.
        optimizer: finfluence.SGD, Adam or AdamW.
        epochs: passes over all n samples.
        batch_size: samples a step.
        directory: where trainings are stored; a path or an fsspec URL.
        runs: trainings an arm. The standard error of mu is about sqrt(2/runs) sqrt(1 - rho + mu^2 (1 + rho^2)/8), with
            rho the correlation of paired measurements (0 for independent orders).
        initialisation: "fixed" starts every run from make_model(seed), "random" gives each run a seed of its own.
        executor: "ensemble" (small models, many at once), "processes" (any task), "ray" (a cluster), or an `Ensemble`,
            `Processes` or `Ray` with options.
        seed: every training's randomness is a function of it, of the run's index and, with independent orders, of what
            the arm removes.
        sampler: how batches are drawn; shuffled by default.
        schedule: of the learning rate; constant by default.
        clip_norm: as in `Plan`.
        accumulation: as in `Plan`.
        precision: as in `Plan`.
        ids: (n,) int64 or str ids of the samples; None for their index.
        measure_epochs: epochs after which queries are measured besides the last, whole or not.
        budget: "steps" trains every arm for as many optimizer steps as the base arm (other samples take the place of
            the removed ones, which is what one-run estimates of influence assume); "epochs" for as many epochs.
        orders: "paired": the k-th training of every arm has one seed, so the batch order of the k-th training with all
            samples less those removed, and the same initial parameters where they are random. No arm's law changes;
            what a pair has in common drops out of the difference of their measurements. "independent": a seed for
            every training.
        collate: makes a batch of samples; torch's default_collate where None.
        device: where models are trained, e.g. "cuda"; None where make_model puts them.
        progress: whether a line and a bar are shown on stderr.

    Returns:
        The truth: everything that the directory holds.

    Raises:
        InputError: an argument cannot be used.
        OracleError: the directory holds another experiment, the executor cannot run the task, or no training succeeds.
    """
    with Retraining(
        task,
        make_model,
        dataset,
        queries,
        subsets=subsets,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        directory=directory,
        initialisation=initialisation,
        executor=executor,
        seed=seed,
        sampler=sampler,
        schedule=schedule,
        clip_norm=clip_norm,
        accumulation=accumulation,
        precision=precision,
        ids=ids,
        measure_epochs=measure_epochs,
        budget=budget,
        orders=orders,
        collate=collate,
        device=device,
        progress=progress,
    ) as experiment:
        return experiment.extend(runs)


def _measured(measure_epochs: Sequence[float], epochs: int) -> tuple[float, ...]:
    for epoch in measure_epochs:
        if not isinstance(epoch, int | float) or not 0 < epoch <= epochs:
            raise InputError(f"measure_epochs holds {epoch!r}; give numbers of epochs up to {epochs}")
    return tuple(sorted({*measure_epochs, epochs}))


def _experiment(problem: Problem) -> dict[str, Any]:
    """What must be the same for trainings to belong to one experiment."""
    versions = {name: ".".join(metadata.version(name).split(".")[:2]) for name in ("torch", "numpy")}
    return {
        "plan": problem.plan.as_dict(),
        "n": problem.n,
        "initialisation": problem.initialisation,
        "budget": problem.budget,
        "orders": problem.orders,
        "measured_epochs": list(problem.measured),
        "queries": {name: fingerprint.of_batch(batch) for name, batch in problem.queries.items()},
        "dataset": fingerprint.of_dataset(problem.dataset, problem.n, problem.collate),
        "task": fingerprint.of_task(problem.task),
        "model": fingerprint.of_model(fresh_model(problem)),
        "versions": versions,
    }


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")
