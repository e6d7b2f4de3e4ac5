"""Executor for small models: hundreds of trainings at once in one process, on the CPU or one GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from finfluence.errors import InputError, OracleError
from finfluence.runs.data import model_device, to_device
from finfluence.runs.engine import isolated_rng
from finfluence.runs.oracle.executors._probe import Cost, probe
from finfluence.runs.oracle.executors._stack import StackedData, StackedTraining, one_thread_each
from finfluence.runs.oracle.executors.base import Tick
from finfluence.runs.oracle.problem import Job, Outcome, Problem, finished, fresh_model

_CACHE_BYTES = 32 << 20  # larger working sets fall out of the last-level cache and are no faster
_MEMORY_SHARE = 0.25
_MOST_MODELS = {"cpu": 1024, "cuda": 16384}
_LEAST_PER_WORKER = 64  # fewer models than this do not pay for a second thread


@dataclass(frozen=True)
class Ensemble:
    """Trains many models at once: parameters stacked, torch.func.vmap over the models, each with its own batches.

    The results are those of single trainings with the same seeds to rounding error (of the plan's precision). Where the
    model draws random numbers (dropout) they are the same statistically, not number by number. The dataset is read
    once, whole. Gradient accumulation changes nothing but rounding, so a batch is taken in one piece.

    Attributes:
        chunk: models trained at once by a worker; None chooses as many as fit a 32 MB working set, 8 to 1024, on the
            CPU, and never more than a quarter of the free memory holds. An interruption loses the chunks under way.
        workers: threads, each with chunks of its own; None takes torch.get_num_threads() on the CPU and 1 on a GPU.
    """

    chunk: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("chunk", "workers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer or None, got {value!r}")

    def open(self, problem: Problem) -> EnsembleSession:
        """Reads the data and tries the model on two copies.

        Raises:
            OracleError: vmap does not support the model, or the data are not tensors.
        """
        return EnsembleSession(self, problem)


class EnsembleSession:
    """See `Session`; work is cut into chunks of models whose trainings have equally many steps."""

    def __init__(self, options: Ensemble, problem: Problem) -> None:
        self.options, self.problem = options, problem
        self.template = fresh_model(problem)
        self.device = model_device(self.template)
        self.data = StackedData(problem, self.device)
        self.queries = {name: to_device(batch, self.device) for name, batch in problem.queries.items()}
        self._cost: Cost | None = None
        # batch statistics must not see padding, so there only arms of one size are stacked
        self.needs_equal_batches = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.template.modules())
        if self.needs_equal_batches and problem.plan.sampler.kind == "poisson":
            raise OracleError(
                "executor 'ensemble' cannot combine batch normalisation with Poisson batches of varying size; "
                "use executor='processes'"
            )

    def cost(self, job: Job) -> Cost:
        """What a stacked model takes (measured once)."""
        if self._cost is None:
            self._cost = probe(self.problem, job, data=self.data, queries=self.queries, template=self.template)
        return self._cost

    def plan(self, jobs: Sequence[Job]) -> tuple[list[list[Job]], int]:
        """The jobs in chunks, and the number of workers."""
        cost = self.cost(jobs[0])
        workers = self.options.workers or (1 if self.device.type == "cuda" else torch.get_num_threads())
        if cost.randomness == "different":
            workers = 1  # torch's random state is one for all threads
        if self.options.workers is None:
            workers = max(1, min(workers, len(jobs) // _LEAST_PER_WORKER))
        most = self.options.chunk or self._fitting(cost, workers)
        groups: dict[tuple[tuple[int, ...], int], list[Job]] = {}
        for job in jobs:
            size = len(self.problem.arms[job.arm].removed) if self.needs_equal_batches else 0
            groups.setdefault((self.problem.checkpoints(job.arm), size), []).append(job)
        chunks = []
        for members in groups.values():
            rounds = -(-len(members) // (most * workers))
            size = -(-len(members) // (rounds * workers))
            chunks += [members[i : i + size] for i in range(0, len(members), size)]
        return chunks, max(1, min(workers, len(chunks)))

    def _fitting(self, cost: Cost, workers: int) -> int:
        if self.device.type == "cuda":
            free, most = torch.cuda.mem_get_info(self.device)[0], _MOST_MODELS["cuda"]
        else:
            free = psutil.virtual_memory().available // workers
            most = max(8, min(_MOST_MODELS["cpu"], _CACHE_BYTES // cost.step_bytes))
        return max(1, min(most, int(_MEMORY_SHARE * free) // cost.step_bytes))

    def describe(self, jobs: Sequence[Job]) -> str:
        """Where the jobs will run and what memory they need."""
        chunks, workers = self.plan(jobs)
        size = max(len(chunk) for chunk in chunks)
        memory = size * workers * self.cost(jobs[0]).step_bytes / 1e6
        where = "GPU" if self.device.type == "cuda" else f"{workers} thread{'s' * (workers > 1)}"
        return f"ensemble on {where}, up to {size} models at once, about {memory:.0f} MB"

    def run(self, jobs: Sequence[Job], *, tick: Tick) -> Iterator[list[Outcome]]:
        """Trains chunk after chunk; see `Session.run`."""
        if not jobs:
            return
        chunks, workers = self.plan(jobs)
        stop = threading.Event()
        with isolated_rng(self.device), one_thread_each(workers):
            threads = 1 if workers > 1 else torch.get_num_threads()
            # a thread has its own setting of how many threads its kernels use
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
                waiting: set[Future[list[Outcome]]] = {
                    pool.submit(self._train, chunk, tick=tick, stop=stop) for chunk in chunks
                }
                try:
                    while waiting:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        for future in done:
                            yield future.result()
                finally:
                    stop.set()
                    for future in waiting:
                        future.cancel()

    def _train(self, jobs: list[Job], *, tick: Tick, stop: threading.Event) -> list[Outcome]:
        start, cost = time.perf_counter(), self.cost(jobs[0])
        if stop.is_set():
            raise InterruptedError
        if cost.randomness == "different":
            torch.manual_seed(jobs[0].seed)
        training = StackedTraining(
            self.problem, jobs, data=self.data, queries=self.queries, template=self.template, randomness=cost.randomness
        )
        values, errors = training.train(cost.sample_bytes, tick=tick, stop=stop)
        seconds, names = (time.perf_counter() - start) / len(jobs), list(self.queries)
        return [
            finished(job, found, queries=names, seconds=seconds)
            if error is None
            else Outcome(job, None, error, seconds)
            for job, found, error in zip(jobs, values, errors, strict=True)
        ]

    def close(self) -> None:
        """Nothing to end: threads live for one `run`."""
