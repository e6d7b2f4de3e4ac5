"""One training of the oracle, by the same engine as `train`: what processes and Ray workers run."""

from __future__ import annotations

import time

import numpy as np
import torch

from finfluence.gradients import evaluating
from finfluence.runs.data import model_device, to_device
from finfluence.runs.engine import Engine, isolated_rng
from finfluence.runs.oracle.problem import Job, Outcome, Problem, finished, one_line
from finfluence.runs.tasks import measurement


def train_one(problem: Problem, job: Job) -> Outcome:
    """Does one training.

    Args:
        problem: what is trained and measured.
        job: which run of which arm.

    Returns:
        Its outcome; whatever the training raises is recorded there, so that the other trainings go on.
    """
    start = time.perf_counter()
    try:
        with isolated_rng(torch.device(problem.device or "cpu")):
            values = _measurements(problem, job)
    except Exception as error:
        return Outcome(job, None, one_line(error), time.perf_counter() - start)
    return finished(job, values, queries=list(problem.queries), seconds=time.perf_counter() - start)


def _measurements(problem: Problem, job: Job) -> np.ndarray:
    model = problem.build_model(job)
    device = model_device(model)
    queries = [to_device(batch, device) for batch in problem.queries.values()]
    arm = problem.arms[job.arm]
    checkpoints = problem.checkpoints(job.arm)
    engine = Engine(
        problem.task,
        model,
        dataset=problem.dataset,
        plan=problem.plan.with_seed(job.seed),
        subset=arm.kept(problem.n) if len(arm.removed) else None,
        collate=problem.collate,
        population=problem.population(job.arm),
    )
    values = np.full((len(checkpoints), len(queries)), np.nan)
    for batch in engine.batches():
        engine.step(batch)
        if batch.step + 1 in checkpoints:
            row = checkpoints.index(batch.step + 1)
            with torch.no_grad(), evaluating(model), engine.autocast():
                values[row] = [float(measurement(problem.task, model, query)) for query in queries]
    return values
