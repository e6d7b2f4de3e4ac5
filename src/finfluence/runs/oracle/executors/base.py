"""The interface of the executors: jobs in, results streamed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from finfluence.runs.oracle.problem import Job, Outcome, Problem

Tick = Callable[[int], None]


class Session(Protocol):
    """An executor at work on one problem; keeps workers and data between calls of `run`."""

    def describe(self, jobs: Sequence[Job]) -> str:
        """Where the jobs will run and what memory they need, for people."""
        ...

    def run(self, jobs: Sequence[Job], *, tick: Tick) -> Iterator[list[Outcome]]:
        """Runs all jobs, in any order.

        Args:
            jobs: what to train.
            tick: called, from any thread, with a number of model steps that were done.

        Yields:
            Outcomes as they come, one for every job in the end.
        """
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


class Executor(Protocol):
    """How trainings are run; a frozen dataclass of options."""

    def open(self, problem: Problem) -> Session:
        """Starts work on a problem.

        Raises:
            OracleError: this executor cannot run it.
        """
        ...
