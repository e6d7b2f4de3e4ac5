"""What an executor gets and gives back: a problem, jobs in, outcomes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from finfluence.errors import InputError
from finfluence.runs.data import Collate
from finfluence.runs.engine import isolated_rng
from finfluence.runs.oracle.arms import Arm, Orders, TrainingBudget
from finfluence.runs.plan import Plan
from finfluence.runs.tasks import Task

Initialisation = Literal["fixed", "random"]


class Job(NamedTuple):
    """One training: the arm's key, the run's index in it and its seed."""

    arm: str
    run: int
    seed: int


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        job: the job.
        values: (checkpoints, queries) float64 measurements; None where the training failed.
        error: why it failed, one line; None where it did not.
        seconds: wall time of the training (for trainings run together, their equal share).
    """

    job: Job
    values: np.ndarray | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Problem:
    """Everything that all trainings of an experiment share; workers receive it once.

    Attributes:
        task: losses and measurement.
        make_model: called with a seed, returns a fresh model.
        dataset: map-style dataset of n samples.
        queries: one ready batch a query, by name.
        plan: how to train; its seed is the experiment's.
        arms: by key, the base arm among them.
        n: number of samples.
        initialisation: "fixed" (make_model(plan.seed) for every run) or "random" (make_model(the run's own seed)).
        budget: "steps" or "epochs".
        orders: "paired" or "independent".
        measured: epochs after which queries are measured, ascending; the last is the end of training.
        collate: makes a batch of samples.
        device: where models are trained; None where make_model puts them.
    """

    task: Task
    make_model: Callable[[int], nn.Module]
    dataset: Any
    queries: Mapping[str, Any]
    plan: Plan
    arms: Mapping[str, Arm]
    n: int
    initialisation: Initialisation
    budget: TrainingBudget
    measured: tuple[float, ...]
    orders: Orders = "paired"
    collate: Collate | None = None
    device: str | None = None

    def population(self, arm: str) -> int:
        """Number of samples that an arm's batches are cut for: all, under equal steps, else those that it trains on."""
        return self.n if self.budget == "steps" else self.n - len(self.arms[arm].removed)

    def checkpoints(self, arm: str) -> tuple[int, ...]:
        """Steps after which an arm's models are measured; the last is the number of steps of its training."""
        return self.plan.measured_steps(self.measured, self.population(arm))

    def build_model(self, job: Job) -> nn.Module:
        """The model a job starts from. Call it where the global random state may change."""
        # 32 bits, because NumPy's and many libraries' seeding takes no more
        seed = self.plan.seed if self.initialisation == "fixed" else job.seed & 0xFFFFFFFF
        return build_model(self.make_model, seed, self.device)


def build_model(make_model: Callable[[int], nn.Module], seed: int, device: str | None) -> nn.Module:
    """`make_model(seed)`, checked, on the device."""
    torch.manual_seed(seed)
    model = make_model(seed)
    if not isinstance(model, nn.Module):
        raise InputError(f"make_model must return a torch.nn.Module, got {type(model).__name__}")
    return model if device is None else model.to(device)


def fresh_model(problem: Problem) -> nn.Module:
    """The model that `make_model` gives for the experiment's own seed, leaving the global random state alone."""
    with isolated_rng(torch.device(problem.device or "cpu")):
        return build_model(problem.make_model, problem.plan.seed, problem.device)


def finished(job: Job, values: np.ndarray, *, queries: list[str], seconds: float) -> Outcome:
    """The outcome of a training that ran to its end; measurements that are not finite make it a failed one."""
    if np.isfinite(values).all():
        return Outcome(job, values, None, seconds)
    query = queries[int(np.flatnonzero(~np.isfinite(values).all(axis=0))[0])]
    value = values[:, queries.index(query)]
    return Outcome(job, None, f"the measurement of query {query!r} is {value[~np.isfinite(value)][0]}", seconds)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line of text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def diverged(loss: float, step: int) -> str:
    """Why a training whose loss is not finite failed."""
    kind = "nan" if math.isnan(loss) else "infinite"
    return f"the training loss is {kind} at step {step}; lower the learning rate or clip the gradient"
