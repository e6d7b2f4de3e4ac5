"""How the oracle's trainings are run: many at once in one process, one a process, or one a Ray task."""

from __future__ import annotations

from typing import Literal, get_args

from finfluence.errors import InputError
from finfluence.runs.oracle.executors.base import Executor, Session
from finfluence.runs.oracle.executors.ensemble import Ensemble
from finfluence.runs.oracle.executors.processes import Processes
from finfluence.runs.oracle.executors.ray import Ray

ExecutorName = Literal["ensemble", "processes", "ray"]
_BY_NAME: dict[str, type[Ensemble] | type[Processes] | type[Ray]] = {
    "ensemble": Ensemble,
    "processes": Processes,
    "ray": Ray,
}


def make_executor(executor: ExecutorName | Executor) -> Executor:
    """The executor of that name with its defaults, or the given one.

    Raises:
        InputError: no such executor.
    """
    if isinstance(executor, str):
        if executor not in _BY_NAME:
            raise InputError(f"unknown executor {executor!r}; choose one of {', '.join(get_args(ExecutorName))}")
        return _BY_NAME[executor]()
    if not hasattr(executor, "open"):
        raise InputError(f"executor must be a name or an Ensemble, Processes or Ray, got {type(executor).__name__}")
    return executor


__all__ = ["Ensemble", "Executor", "ExecutorName", "Processes", "Ray", "Session", "make_executor"]
