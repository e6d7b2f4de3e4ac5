"""Ray: the same trainings, and a worker that is lost on the way."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from oracle_problems import Misfortunes, experiment, jobs_of, largest_difference, outcomes_of

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle import Ray


def test_missing_ray_says_what_to_install(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OracleError, match=r'pip install "finfluence\[ray\]"'):
        Ray().open(experiment(tmp_path).problem)


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="cpus"):
        Ray(cpus=0)


def test_survives_the_loss_of_a_worker(tmp_path: Any) -> None:
    """The first training without sample 0 kills its process; Ray starts another one, and all results are there."""
    ray = pytest.importorskip("ray")
    problem = experiment(tmp_path / "truth", task=Misfortunes("kill-once", str(tmp_path))).problem
    found = outcomes_of(Ray(), problem, jobs_of(problem, 1))
    assert (tmp_path / "killed").exists()
    assert largest_difference(found, problem) == 0
    assert not ray.is_initialized()
