"""Executor for clusters: the same jobs as Ray tasks."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle.executors.base import Tick
from finfluence.runs.oracle.executors.processes import available_cores
from finfluence.runs.oracle.problem import Job, Outcome, Problem, one_line

_RETRIES = 2  # of a task whose worker was lost
_AHEAD = 4  # tasks submitted for each core, so that no core waits for the driver


@dataclass(frozen=True)
class Ray:
    """Trains one model a Ray task.

    Attributes:
        address: of a cluster, as in ray.init; None joins the cluster that this process is already connected to, or
            starts Ray on this machine and stops it at the end.
        cpus: cores that a training takes.
        gpus: GPUs that a training takes; a fraction lets several share one (and retrain(device="cuda") uses it).
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.cpus > 0:
            raise InputError(f"cpus must be positive, got {self.cpus!r}")
        if self.gpus < 0:
            raise InputError(f"gpus must not be negative, got {self.gpus!r}")

    def open(self, problem: Problem) -> RaySession:
        """Connects to Ray and puts the problem in its object store.

        Raises:
            OracleError: Ray is missing, cannot be reached, or cannot serialise the problem.
        """
        return RaySession(self, problem)


class RaySession:
    """See `Session`."""

    def __init__(self, options: Ray, problem: Problem) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise OracleError("executor 'ray' needs Ray; pip install \"finfluence[ray]\"") from None
        self.options, self.steps = options, {arm: problem.checkpoints(arm)[-1] for arm in problem.arms}
        self.started = not self.ray.is_initialized()
        if self.started:
            self._start()
        try:
            self.problem = self.ray.put(problem)
        except Exception as error:
            self.close()
            raise OracleError(f"Ray cannot serialise the problem: {one_line(error)}") from error
        self.task = self.ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=_RETRIES)(_train)

    def _start(self) -> None:
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": available_cores()}
        if self.options.address is not None:
            local = {"address": self.options.address}
        try:
            with warnings.catch_warnings(), _importable_here():
                # Ray announces changes of its own defaults here, which users of the oracle cannot act on
                warnings.simplefilter("ignore", FutureWarning)
                self.ray.init(**local, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:
            where = self.options.address or "this machine"
            raise OracleError(f"Ray cannot be started at {where}: {one_line(error)}") from error

    def describe(self, jobs: Sequence[Job]) -> str:
        """Where the jobs will run."""
        resources = self.ray.cluster_resources()
        return f"Ray with {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs, one training a task"

    def run(self, jobs: Sequence[Job], *, tick: Tick) -> Iterator[list[Outcome]]:
        """Trains the jobs; see `Session.run`."""
        queue = deque(jobs)
        limit = max(1, int(_AHEAD * self.ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, Job] = {}
        try:
            while queue or running:
                while queue and len(running) < limit:
                    job = queue.popleft()
                    running[self.task.remote(self.problem, job)] = job
                done, _ = self.ray.wait(list(running), num_returns=1)
                outcomes = [self._outcome(reference, running.pop(reference)) for reference in done]
                for outcome in outcomes:
                    tick(self.steps[outcome.job.arm])
                yield outcomes
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return Outcome(job, None, one_line(error), 0.0)

    def close(self) -> None:
        """Stops Ray where this session started it."""
        if self.started and self.ray.is_initialized():
            self.ray.shutdown()


@contextlib.contextmanager
def _importable_here() -> Iterator[None]:
    """Lets the workers of a Ray that is started inside import what this process can."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _train(problem: Problem, job: Job) -> Outcome:
    """Body of a Ray task."""
    import torch

    from finfluence.runs.oracle.single import train_one

    torch.set_num_threads(1)
    return train_one(problem, job)
