"""An experiment as a whole: what is trained, what is reused, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle_problems import Misfortunes, N, Serial, dataset, experiment, mlp, queries
from scipy.stats import ks_2samp

from finfluence.errors import InputError, OracleError
from finfluence.influence import metadata
from finfluence.runs import Engine
from finfluence.runs.oracle import open_truth, retrain, retrain_until
from finfluence.runs.oracle.arms import BASE, make_arm, run_seed
from finfluence.runs.tasks import ClassificationTask
from finfluence.sensitivity import SGD


def _jobs(directory: Any, runs: int, **changes: Any) -> list[Any]:
    executor = Serial()
    with experiment(directory, executor=executor, **changes) as work:
        work.extend(runs)
    return executor.jobs


def test_every_arm_is_trained_once(tmp_path: Any) -> None:
    """Two names of one set share an arm, and the base arm serves all subsets."""
    subsets = {"a": [3, 1], "b": [1, 3], "c": [5]}
    jobs = _jobs(tmp_path, 2, subsets=subsets)
    assert len(jobs) == len(set(jobs)) == 3 * 2
    assert len({job.seed for job in jobs}) == 2  # one for the k-th training of every arm
    truth = open_truth(tmp_path)
    np.testing.assert_array_equal(truth.losses("one", "a").trained_without, truth.losses("one", "b").trained_without)
    assert sorted(truth.subsets) == ["a", "b", "c"]


def test_more_runs_and_subsets_reuse_what_is_there(tmp_path: Any) -> None:
    first = _jobs(tmp_path, 4)
    before = open_truth(tmp_path).losses("several", "some")
    more = _jobs(tmp_path, 6)
    other = _jobs(tmp_path, 6, subsets={"new": [20, 21]})
    assert len(first) == 3 * 4
    assert {(job.arm, job.run) for job in more} == {(job.arm, run) for job in first for run in (4, 5)}
    assert {job.arm for job in other} == {make_arm(np.array([20, 21])).key}
    after = open_truth(tmp_path)
    np.testing.assert_array_equal(after.losses("several", "some").trained_with[:4], before.trained_with)
    assert sorted(after.subsets) == ["new", "single", "some"]
    assert after.influence("several")["runs_without"].to_list() == [6, 6, 6]
    assert _jobs(tmp_path, 6) == []


def test_string_ids_name_samples(tmp_path: Any) -> None:
    ids = [f"doc-{i}" for i in range(N)]
    jobs = _jobs(tmp_path, 1, ids=ids, subsets={"web": ["doc-11"]})
    assert {job.arm for job in jobs} == {BASE, make_arm(np.array([11])).key}
    assert open_truth(tmp_path).subsets["web"].tolist() == ["doc-11"]


def test_seeds_do_not_depend_on_what_else_is_trained() -> None:
    """Pairs share a seed, runs and experiments do not; with independent orders no two trainings do."""
    every = [(s, arm, r) for s in (0, 1) for arm in ("base", "ab") for r in range(50)]
    assert run_seed(0, "base", 3) == run_seed(0, "ab", 3)
    assert len({run_seed(*key) for key in every}) == 100
    assert len({run_seed(*key, orders="independent") for key in every}) == 200


def test_pairs_differ_less_than_trainings_do(tmp_path: Any) -> None:
    """A pair has its batch order in common, so the difference varies less, while the laws of both arms stay theirs."""
    found = {}
    for orders in ("paired", "independent"):
        with experiment(tmp_path / orders, orders=orders, optimizer=SGD(lr=0.05), epochs=8) as work:
            found[orders] = work.extend(96)
    assert found["paired"].paired
    assert not found["independent"].paired
    for subset in ("some", "single"):
        (p, q), (p2, q2) = (found[orders].losses("several", subset) for orders in ("paired", "independent"))
        assert np.std(q - p) < 0.5 * np.std(q2 - p2)
        # the same laws: Kolmogorov-Smirnov, seed 0, fails with probability 1e-4 each
        assert ks_2samp(p, p2).pvalue > 1e-4
        assert ks_2samp(q, q2).pvalue > 1e-4
    tight, wide = (found[orders].influence("several") for orders in ("paired", "independent"))
    assert ((tight["mu"] - wide["mu"]).abs() < 4 * (tight["se"] ** 2 + wide["se"] ** 2).sqrt()).all()
    with pytest.raises(OracleError, match="orders = 'paired', now it is 'independent'"):
        experiment(tmp_path / "paired", orders="independent", optimizer=SGD(lr=0.05), epochs=8)
    # what an earlier version began goes on with independent orders
    path = tmp_path / "independent" / "truth.json"
    content = json.loads(path.read_text())
    del content["experiment"]["orders"]
    path.write_text(json.dumps(content))
    with pytest.raises(OracleError, match="orders = 'independent', now it is 'paired'"):
        experiment(tmp_path / "independent", optimizer=SGD(lr=0.05), epochs=8)
    assert not open_truth(tmp_path / "independent").paired
    with experiment(tmp_path / "independent", orders="independent", optimizer=SGD(lr=0.05), epochs=8) as work:
        assert work.extend(97).runs(None) == 97
    with pytest.raises(InputError, match="unknown orders 'mixed'"):
        experiment(tmp_path / "mixed", orders="mixed")


def test_budgets(tmp_path: Any) -> None:
    half = {"subsets": {"half": list(range(26))}}
    steps, epochs = (experiment(tmp_path / b, budget=b, **half).problem for b in ("steps", "epochs"))
    arm = make_arm(np.arange(26)).key
    assert steps.checkpoints(BASE) == steps.checkpoints(arm) == epochs.checkpoints(BASE) == (3 * 7,)
    assert epochs.checkpoints(arm) == (3 * 4,)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": 4}, "plan.epochs = 3, now it is 4"),
        ({"seed": 1}, "plan.seed"),
        ({"optimizer": SGD(lr=0.2, momentum=0.9)}, "plan.optimizer.lr = 0.3, now it is 0.2"),
        ({"queries": {"one": queries()["one"]}}, "queries.several"),
        ({"queries": queries() | {"one": queries()["several"]}}, "queries.one"),
        ({"task": ClassificationTask(label_smoothing=0.1)}, "task"),
        ({"make_model": lambda seed: mlp(seed + 1)}, "model"),
        ({"initialisation": "random"}, "initialisation"),
        ({"budget": "epochs"}, "budget"),
        ({"measure_epochs": [1]}, "measured_epochs"),
        ({"subsets": {"some": [1, 2]}}, "subset 'some' of 7 other samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_experiment_is_refused_with_the_field(tmp_path: Any, changes: dict[str, Any], field: str) -> None:
    experiment(tmp_path)
    with pytest.raises(OracleError, match=field):
        experiment(tmp_path, **changes)


def test_other_data_are_refused(tmp_path: Any) -> None:
    experiment(tmp_path)
    data = dataset()
    data.tensors[0][N - 1, 0] += 1
    with pytest.raises(OracleError, match="dataset"):
        experiment(tmp_path, dataset=data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": {}}, "non-empty mapping"),
        ({"subsets": {"none": []}}, "'none' is empty"),
        ({"subsets": {"all": range(N)}}, "whole training set"),
        ({"subsets": {"x": [1, 99]}}, "99"),
        ({"subsets": {"x": [1, 1]}}, "more than once"),
        ({"subsets": {3: [1]}}, "non-empty string"),
        ({"ids": [0, 1]}, "ids names 2 samples"),
        ({"batch_size": 60}, "batch_size"),
        ({"queries": {}}, "queries"),
        ({"queries": {"run": queries()["one"]}}, "cannot be named 'run'"),
        ({"measure_epochs": [4]}, "measure_epochs"),
        ({"initialisation": "warm"}, "initialisation 'warm'"),
        ({"budget": "hours"}, "budget 'hours'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(tmp_path: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        experiment(tmp_path / "truth", **changes)
    assert not (tmp_path / "truth").exists()


def test_a_subset_must_leave_a_batch(tmp_path: Any) -> None:
    with pytest.raises(OracleError, match="fewer than the batch size"):
        experiment(tmp_path, subsets={"most": range(N - 3)})


def test_failures_are_tried_again_by_the_next_call_only(tmp_path: Any) -> None:
    executor = Serial()
    with experiment(tmp_path / "t", task=Misfortunes("raise", ""), executor=executor) as work:
        assert len(work.extend(2).failed()) == 2
        work.extend(2)
        assert len(executor.jobs) == 6
        assert len(work.extend(3).failed()) == 3
    assert len(_jobs(tmp_path / "t", 3, task=Misfortunes("raise", ""))) == 3


class _Broken(ClassificationTask):
    def losses(self, model: Any, batch: Any) -> Any:
        raise KeyError("labels")


def test_hopeless_experiments_stop(tmp_path: Any) -> None:
    executor = Serial()
    with (
        experiment(tmp_path, task=_Broken(), executor=executor) as work,
        pytest.raises(OracleError, match="first 8 trainings all failed: KeyError"),
    ):
        work.extend(50)
    assert len(open_truth(tmp_path).failed()) == 8


def test_deterministic_training_is_reported(tmp_path: Any) -> None:
    """Where all samples are the same, their order changes nothing."""
    arguments = {"optimizer": SGD(lr=0.1), "epochs": 2, "batch_size": 5, "subsets": {"x": [50]}, "progress": False}
    few = dataset()
    few.tensors = (few.tensors[0][:1].repeat(N, 1), few.tensors[1][:1].repeat(N))
    truth = retrain(ClassificationTask(), mlp, few, queries(), directory=tmp_path / "d", runs=5, **arguments)
    with pytest.raises(OracleError, match="deterministic training: query 'several'"):
        truth.influence("several")


def test_measured_epochs_are_kept_apart(tmp_path: Any) -> None:
    with experiment(tmp_path, measure_epochs=[1]) as work:
        truth = work.extend(5)
    assert truth.epochs == [1, 3]
    assert not np.array_equal(truth.losses("one", "some", epoch=1), truth.losses("one", "some"))
    mean = truth.losses("one", "some", epoch="mean")
    for arm, (first, last) in enumerate(
        zip(truth.losses("one", "some", epoch=1), truth.losses("one", "some"), strict=True)
    ):
        np.testing.assert_allclose(mean[arm], (first + last) / 2)
    frame = truth.influence("one", epoch="mean")
    assert metadata(frame)["epoch"] == "mean"
    assert frame["mu"].to_list() != truth.influence("one")["mu"].to_list()
    with pytest.raises(InputError, match="or 'mean'"):
        truth.influence("one", epoch=2)


def test_measured_within_an_epoch(tmp_path: Any) -> None:
    """After a part of an epoch is after the nearest step, whoever trains."""
    arguments: dict[str, Any] = {"measure_epochs": [0.55, 1]}
    with experiment(tmp_path / "together", **arguments) as work:
        truth = work.extend(4)
        problem = work.problem
    with experiment(tmp_path / "one by one", executor=Serial(), **arguments) as work:
        alone = work.extend(4)
    assert truth.epochs == open_truth(tmp_path / "together").epochs == [0.55, 1, 3]
    for run in range(4):
        plan = problem.plan.with_seed(run_seed(problem.plan.seed, BASE, run))
        model = mlp(problem.plan.seed)
        engine = Engine(problem.task, model, dataset=dataset(), plan=plan)
        for batch in engine.batches():
            engine.step(batch)
            for epoch, steps in ((0.55, 4), (1, 7)):
                if batch.step + 1 == steps:
                    with torch.no_grad():
                        expected = float(problem.task.losses(model, queries()["one"]).mean())
                    for found in (truth, alone):
                        value = found.losses("one", "some", epoch=epoch).trained_with[run]
                        assert value == pytest.approx(expected, rel=1e-4)
    assert truth.influence("one", epoch="mean")["mu"].is_finite().all()
    with pytest.raises(InputError, match="numbers of epochs up to 3"):
        experiment(tmp_path / "wrong", measure_epochs=[0.0, 1])


def test_until_precise(tmp_path: Any) -> None:
    """Stops at the first look whose widest interval is narrow enough, and goes on with the same trainings."""
    with experiment(tmp_path) as work:
        states = list(retrain_until(work, "several", precision=1.2, step_runs=8, runs=200))
        assert [state.runs for state in states] == [8 * (k + 1) for k in range(len(states))]
        assert [state.reached for state in states] == [False] * (len(states) - 1) + [True]
        assert states[-1].width <= 1.2 < states[-2].width
        limited = list(retrain_until(work, "several", precision=0.01, step_runs=50, runs=60))
        assert [state.runs for state in limited] == [50, 60]
        assert not limited[-1].reached
        with pytest.raises(InputError, match="precision"):
            next(retrain_until(work, "several", precision=0))
        with pytest.raises(InputError, match="unknown query"):
            next(retrain_until(work, "other", precision=1))


def test_progress_goes_to_stderr(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with experiment(tmp_path, progress=True) as work:
        work.extend(2)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "6 trainings, 126 optimizer steps" in captured.err
    assert "MB" in captured.err


_SCRIPT = """
import signal
import sys
sys.path.insert(0, {tests!r})
from oracle_problems import experiment
from finfluence.runs.oracle import Ensemble

# a shell that runs tests in the background has told its children to ignore interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    with experiment({directory!r}, executor=Ensemble(chunk=3, workers=1), epochs=40) as work:
        work.extend(3000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_finished_trainings_survive(tmp_path: Path, how: signal.Signals) -> None:
    """A process killed in mid-experiment: what it stored is whole and is not trained again."""
    directory = tmp_path / "truth"
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(tests=str(Path(__file__).parent), directory=str(directory)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(directory.glob("trainings/*.parquet"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.wait(timeout=60)
    assert process.returncode != 0

    executor = Serial()
    with experiment(directory, executor=executor, epochs=40) as work:
        stored = work.store.trainings(["several", "one"]).filter(status="finished").select("arm", "run").rows()
        assert len(stored) >= 6
        runs = max(run for _, run in stored) + 1
        truth = work.extend(runs)
    assert {(job.arm, job.run) for job in executor.jobs}.isdisjoint(stored)
    assert len(executor.jobs) + len(stored) == 3 * runs
    assert truth.runs(None) == truth.runs("some") == truth.runs("single") == runs
