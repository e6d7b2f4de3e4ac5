"""The process pool: the same trainings, and what happens when one fails or takes its process with it."""

from __future__ import annotations

from typing import Any

import pytest
from oracle_problems import Misfortunes, experiment, jobs_of, largest_difference, outcomes_of

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle import Processes
from finfluence.runs.oracle.executors import make_executor


def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Any) -> None:
    """One arm's trainings raise; the others equal single trainings exactly."""
    problem = experiment(tmp_path / "truth", task=Misfortunes("raise", str(tmp_path))).problem
    found = outcomes_of(Processes(workers=2), problem, jobs_of(problem, 2))
    struck = {job for job in found if len(problem.arms[job.arm].removed) == 7}
    assert {found[job].error for job in struck} == {"RuntimeError: the measurement failed"}
    assert largest_difference({job: o for job, o in found.items() if job not in struck}, problem) == 0


def test_a_dying_process_is_replaced_and_its_training_retried_once(tmp_path: Any) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    with experiment(tmp_path / "truth", task=Misfortunes("exit", str(marks)), executor=Processes(workers=1)) as work:
        truth = work.extend(1)
    assert len(list(marks.iterdir())) == 2
    failed = truth.failed()
    assert failed["subset"].to_list() == ["some"]
    assert failed["error"].to_list() == ["the worker process exited with status 3, 2 times"]
    assert truth.runs(None) == truth.runs("single") == 1


def test_what_cannot_be_sent_is_refused(tmp_path: Any) -> None:
    from oracle_problems import mlp

    problem = experiment(tmp_path, make_model=lambda seed: mlp(seed)).problem
    with pytest.raises(OracleError, match="top level of a module"):
        Processes().open(problem)


def test_names_and_options_are_checked() -> None:
    with pytest.raises(InputError, match="unknown executor 'threads'"):
        make_executor("threads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="workers"):
        Processes(workers=0)
