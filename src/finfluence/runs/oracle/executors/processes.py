"""Executor for any task: a local pool of processes, one training a process at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import psutil

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle.executors.base import Tick
from finfluence.runs.oracle.problem import Job, Outcome, Problem, one_line

_ATTEMPTS = 2
_READY = "ready"


@dataclass(frozen=True)
class Processes:
    """Trains one model a process on one thread, in freshly started processes that get the problem once.

    `task`, `make_model`, the dataset and the queries must be picklable: defined at the top level of a module, not
    lambdas. A script that uses this executor needs `if __name__ == "__main__":` around what it runs. A process that
    dies is replaced and its training tried once more.

    Attributes:
        workers: processes; None for one a core this process may use.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise InputError(f"workers must be a positive integer or None, got {self.workers!r}")

    def open(self, problem: Problem) -> ProcessesSession:
        """Packs the problem for the workers.

        Raises:
            OracleError: something in it cannot be pickled.
        """
        return ProcessesSession(problem, self.workers or available_cores())


def available_cores() -> int:
    """Cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    job: Job | None = None


@dataclass
class _Queue:
    jobs: deque[Job]
    attempts: dict[Job, int] = field(default_factory=dict)


class ProcessesSession:
    """See `Session`; the workers live until `close`."""

    def __init__(self, problem: Problem, workers: int) -> None:
        self.size, self.steps = workers, {arm: problem.checkpoints(arm)[-1] for arm in problem.arms}
        try:
            self.payload = pickle.dumps(problem, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OracleError(
                f"executor 'processes' must send the problem to other processes, but: {one_line(error)}; define task, "
                "make_model, collate and dataset at the top level of a module, or use executor='ensemble'"
            ) from error
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []

    def describe(self, jobs: Sequence[Job]) -> str:
        """Where the jobs will run and what memory they need."""
        count = min(self.size, len(jobs))
        return (
            f"{count} process{'es' * (count > 1)} of one thread, each with a copy of the data "
            f"({len(self.payload) / 1e6:.1f} MB) beside PyTorch's own few hundred MB"
        )

    def run(self, jobs: Sequence[Job], *, tick: Tick) -> Iterator[list[Outcome]]:
        """Trains the jobs; see `Session.run`."""
        queue = _Queue(deque(jobs))
        remaining = len(jobs)
        try:
            while remaining:
                self._staff(min(self.size, remaining))
                self._assign(queue)
                outcomes = self._collect(queue)
                for outcome in outcomes:
                    tick(self.steps[outcome.job.arm])
                remaining -= len(outcomes)
                if outcomes:
                    yield outcomes
        finally:
            if remaining:
                self.close()  # half-done trainings must not answer the next call

    def _staff(self, count: int) -> None:
        while len(self.workers) < count:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_work, args=(theirs,), daemon=True, name="finfluence-oracle")
            process.start()
            theirs.close()
            worker = _Worker(process, ours)
            self.workers.append(worker)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed in _collect
                ours.send_bytes(self.payload)

    def _assign(self, queue: _Queue) -> None:
        for worker in self.workers:
            if worker.ready and worker.job is None and queue.jobs:
                worker.job = queue.jobs.popleft()
                queue.attempts[worker.job] = queue.attempts.get(worker.job, 0) + 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.connection.send(worker.job)

    def _collect(self, queue: _Queue) -> list[Outcome]:
        outcomes = []
        ready = set(wait([worker.connection for worker in self.workers]))
        for worker in [worker for worker in self.workers if worker.connection in ready]:
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                outcomes += self._bury(worker, queue)
                continue
            if isinstance(message, Outcome):
                worker.job = None
                outcomes.append(message)
            elif message == _READY:
                worker.ready = True
            else:
                raise OracleError(
                    f"executor 'processes' could not start: {message}; define task, make_model, collate and "
                    "dataset in an importable module, or use executor='ensemble'"
                )
        return outcomes

    def _bury(self, worker: _Worker, queue: _Queue) -> list[Outcome]:
        """Removes a worker that died; its training is queued again, or given up after the second death."""
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        how = _death(worker.process.exitcode)
        if not worker.ready:
            raise OracleError(
                f"a worker process {how} while it started; put what the script runs under "
                "`if __name__ == \"__main__\":`, free memory, or use executor='ensemble'"
            )
        job = worker.job
        if job is None:
            return []
        if queue.attempts[job] < _ATTEMPTS:
            queue.jobs.append(job)
            return []
        return [Outcome(job, None, f"the worker process {how}, {_ATTEMPTS} times", 0.0)]

    def close(self) -> None:
        """Ends the worker processes."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self.workers = []


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"died by signal {-code}" if code is not None and code < 0 else f"exited with status {code}"


def _work(connection: Connection) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    import torch

    from finfluence.runs.oracle.single import train_one

    torch.set_num_threads(1)
    try:
        problem: Problem = pickle.loads(connection.recv_bytes())
    except EOFError:
        return
    except Exception as error:
        connection.send(one_line(error))
        return
    connection.send(_READY)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            connection.send(train_one(problem, connection.recv()))
