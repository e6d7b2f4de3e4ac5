"""Small training problems that other processes can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from finfluence.runs.oracle import Retraining
from finfluence.runs.oracle.executors.base import Tick
from finfluence.runs.oracle.problem import Job, Outcome, Problem
from finfluence.runs.oracle.single import train_one
from finfluence.runs.tasks import ClassificationTask
from finfluence.sensitivity import SGD

N, FEATURES, CLASSES = 53, 6, 3  # 53 is no multiple of the batch size, so last batches are ragged


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, FEATURES, generator=generator)
    weights = torch.randn(FEATURES, CLASSES, generator=generator)
    return TensorDataset(inputs, (inputs @ weights + torch.randn(N, CLASSES, generator=generator)).argmax(1))


def queries() -> dict[str, Any]:
    inputs, targets = dataset().tensors
    return {"several": (inputs[:4] + 0.1, targets[:4]), "one": (inputs[9:10], targets[9:10])}


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))


SUBSETS = {"some": list(range(7)), "single": [11]}


def experiment(directory: Path | str, **changes: Any) -> Retraining:
    """The problem of most tests: 53 samples, an MLP, three short epochs."""
    arguments: dict[str, Any] = {
        "task": ClassificationTask(),
        "make_model": mlp,
        "dataset": dataset(),
        "queries": queries(),
        "subsets": SUBSETS,
        "optimizer": SGD(lr=0.3, momentum=0.9),
        "epochs": 3,
        "batch_size": 8,
        "directory": directory,
        "progress": False,
    } | changes
    positional = [arguments.pop(name) for name in ("task", "make_model", "dataset", "queries")]
    return Retraining(*positional, **arguments)


class Serial:
    """An executor of single trainings in this process, which remembers what it was asked for."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def open(self, problem: Problem) -> Serial:
        self.problem = problem
        return self

    def describe(self, jobs: Sequence[Job]) -> str:
        return "one after the other"

    def run(self, jobs: Sequence[Job], *, tick: Tick) -> Iterator[list[Outcome]]:
        for job in jobs:
            self.jobs.append(job)
            outcome = train_one(self.problem, job)
            tick(1)
            yield [outcome]

    def close(self) -> None:
        pass


def jobs_of(problem: Problem, runs: int) -> list[Job]:
    from finfluence.runs.oracle.arms import run_seed

    return [Job(arm, run, run_seed(problem.plan.seed, arm, run)) for arm in problem.arms for run in range(runs)]


def outcomes_of(executor: Any, problem: Problem, jobs: list[Job]) -> dict[Job, Outcome]:
    session = executor.open(problem)
    try:
        found = [outcome for part in session.run(jobs, tick=lambda steps: None) for outcome in part]
    finally:
        session.close()
    assert len(found) == len(jobs)
    return {outcome.job: outcome for outcome in found}


def values_of(outcome: Outcome) -> np.ndarray:
    assert outcome.error is None, outcome.error
    assert outcome.values is not None
    return outcome.values


def largest_difference(found: dict[Job, Outcome], problem: Problem) -> float:
    """Largest relative difference of measurements from single trainings with the same seeds."""
    if isinstance(problem.task, Misfortunes):
        problem = replace(problem, task=ClassificationTask())
    worst = 0.0
    for job, outcome in found.items():
        expected = train_one(problem, job)
        worst = max(worst, float(np.abs(values_of(outcome) / values_of(expected) - 1).max()))
    return worst


MARKER = dataset().tensors[0][0]


class Misfortunes(ClassificationTask):
    """Trainings that never see sample 0 fail ("raise"), or end their process, always ("exit") or once ("kill-once").

    Args:
        how: what happens.
        folder: where marks of it are left.
    """

    def __init__(self, how: str, folder: str) -> None:
        super().__init__()
        self.how, self.folder = how, folder
        self.model: Any = None  # held, because a freed model's id may come back with the next one
        self.seen = False

    def losses(self, model: Any, batch: Any) -> Any:
        if model is not self.model:
            self.model, self.seen = model, False
        self.seen |= bool((batch[0] == MARKER).all(1).any())
        return super().losses(model, batch)

    def measure(self, model: Any, batch: Any) -> Any:
        if not self.seen:
            self._strike()
        return super().losses(model, batch).mean()

    def _strike(self) -> None:
        if self.how == "raise":
            raise RuntimeError("the measurement failed\nfor a long reason")
        if self.how == "exit":
            with open(os.path.join(self.folder, str(time.monotonic_ns())), "w"):
                os._exit(3)
        try:
            os.close(os.open(os.path.join(self.folder, "killed"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
