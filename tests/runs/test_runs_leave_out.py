"""Training along the recorded path without a subset: what it measures, what is kept, and what μ becomes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_problems import TASK, N, dataset, mlp, queries, train
from torch.nn import functional

import finfluence as fi
from finfluence.errors import InputError, RecordingError, ReplayError
from finfluence.influence import metadata
from finfluence.runs import Engine
from finfluence.workflows.digits import digits

SUBSETS = {"few": [1, 4, 9], "one": [17]}


def leave_out(run: fi.Run, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "dataset": dataset(),
        "queries": queries(),
        "subsets": SUBSETS,
        "show_progress": "never",
    }
    settings |= changes
    return fi.leave_out(run.directory, settings.pop("task", TASK), settings.pop("model", None) or mlp(), **settings)


def naive(run: fi.Run, removed: list[int], *, momentum: float = 0.0, lr: float = 0.5) -> dict[str, float]:
    """A plain loop over the recorded batches less some rows, every step the mean of those that are left."""
    net, (x, y) = mlp(), dataset().tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    plan = fi.Plan.from_dict(run.manifest["plan"])
    for batch in plan.sampler.batches(N, plan.batch_size, seed=plan.seed, steps=plan.steps(N)):
        rows = [int(i) for i in batch.indices if i not in removed]
        optimizer.zero_grad()
        if rows:
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return {name: float(functional.cross_entropy(net(a), b)) for name, (a, b) in queries().items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": fi.SGD(lr=0.2, momentum=0.9)}, {"accumulation": 2}],
    ids=["plain", "momentum", "accumulation"],
)
def test_it_is_the_recorded_training_less_the_subset(tmp_path: Path, changes: dict[str, Any]) -> None:
    """To rounding in float64; batches that the subset empties among them."""
    run = train(tmp_path / "run", **changes)
    sgd = changes.get("optimizer", fi.SGD(lr=0.5))
    first = next(iter(fi.Plan.from_dict(run.manifest["plan"]).sampler.batches(N, 5, seed=3, steps=1)))
    subsets = SUBSETS | {"a whole batch": first.indices.tolist()}
    net = mlp()
    frame = leave_out(run, subsets=subsets, model=net)
    assert frame["query"].to_list() == ["several"] * 3 + ["one"] * 3
    for row in frame.iter_rows(named=True):
        for column, removed in (("measured_with", []), ("measured_without", subsets[row["subset"]])):
            expected = naive(run, removed, momentum=sgd.momentum, lr=sgd.lr)[row["query"]]
            assert row[column] == pytest.approx(expected, rel=1e-11)
        assert row["size"] == len(subsets[row["subset"]])
        assert row["ci_low"] < row["mu"] < row["ci_high"]
    first_order = run.influence("one", subsets=subsets)
    assert frame.filter(query="one")["first_order"].to_list() == first_order["mu"].to_list()
    assert metadata(frame)["estimator"] == "finite removal"
    # the model ends where the recorded training did
    with torch.no_grad():
        values = [float(functional.cross_entropy(net(a), b)) for a, b in queries().values()]
    assert values == pytest.approx(frame.group_by("query", maintain_order=True).first()["measured_with"].to_list())


def test_small_steps_leave_first_order(tmp_path: Path) -> None:
    """Where a training is linear, the finite removal is what the signals add up to.

    But for what others' weight does in batches of three and five, of which one row is more than a few per cent.
    """
    run = train(tmp_path / "run", optimizer=fi.SGD(lr=1e-4), model=mlp())
    frame = leave_out(run)
    change = frame["measured_without"] - frame["measured_with"]
    assert (change.abs() > 1e-8).all()
    np.testing.assert_allclose(frame["mu"], frame["first_order"], rtol=0.06, atol=0.02)


def test_poisson_batches_are_only_smaller(tmp_path: Path) -> None:
    """Under Poisson sampling with a fixed denominator nothing takes the removed samples' place."""
    run = train(tmp_path / "run", sampler=fi.Sampler("poisson"), optimizer=fi.SGD(lr=0.3))
    frame = leave_out(run)
    net, (x, y) = mlp(), dataset().tensors
    plan = fi.Plan.from_dict(run.manifest["plan"])
    engine = Engine(TASK, net, dataset=dataset(), plan=plan)
    for batch in plan.sampler.batches(N, 5, seed=3, steps=engine.total_steps):
        rows = [int(i) for i in batch.indices if i not in SUBSETS["few"]]
        grads = torch.autograd.grad(
            functional.cross_entropy(net(x[rows]), y[rows], reduction="sum") / 5, list(net.parameters())
        )
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= 0.3 * g
    with torch.no_grad():
        expected = float(functional.cross_entropy(net(queries()["one"][0]), queries()["one"][1]))
    assert frame.filter(query="one", subset="few")["measured_without"][0] == pytest.approx(expected, rel=1e-11)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path / "run")
    before = leave_out(run, subsets={"few": SUBSETS["few"]})
    taken = []
    step = Engine.step

    def counted(self: Engine, batch: Any, around: Any = None) -> Any:
        taken.append(batch.step)
        return step(self, batch, around)

    monkeypatch.setattr(Engine, "step", counted)
    after = leave_out(run, subsets={"named otherwise": [9, 4, 1], "one": [17]})
    assert taken == list(range(15))  # one training: the subset that is new
    assert after.filter(subset="named otherwise")["mu"].to_list() == before["mu"].to_list()
    kept = tmp_path / "run" / "left_out.json"
    assert len(json.loads(kept.read_text())["measured"]) == 3
    kept.write_text("{")
    with pytest.raises(InputError, match=r"left_out\.json is damaged"):
        leave_out(run)
    # a question about other epochs is another measurement
    kept.unlink()
    leave_out(run)
    # and so is one of another training
    content = json.loads(kept.read_text())
    content["settings"]["end"] = "another"
    kept.write_text(json.dumps(content))
    taken.clear()
    leave_out(run)
    assert len(taken) == 45
    options = fi.ReplayOptions(measure_epochs="second-half")
    again = fi.replay(tmp_path / "run", TASK, mlp(), dataset=dataset(), queries=queries(), options=options)
    taken.clear()
    mean = leave_out(again)
    assert len(taken) == 45
    assert mean["measured_with"].to_list() != before["measured_with"].to_list()


def test_a_killed_call_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path / "run")
    step, taken = Engine.step, []

    def killed(self: Engine, batch: Any, around: Any = None) -> Any:
        taken.append(batch.step)
        if len(taken) == 40:
            raise KeyboardInterrupt
        return step(self, batch, around)

    monkeypatch.setattr(Engine, "step", killed)
    net = mlp()
    with pytest.raises(KeyboardInterrupt):
        leave_out(run, model=net)
    leave_out(run)
    assert len(taken) == 40 + 15


def test_whole_classes_come_out_as_retraining_has_them(tmp_path: Path) -> None:
    """First order is wrong about classes in size and sign; one training each is near what pairs of retrainings find."""
    run = digits(samples=200, epochs=4, seed=3).train(tmp_path / "run", sensitivity="replay")
    frame = run.leave_out(groups="label").filter(query="validation")
    truth = run.verify_groups("label", runs=8, progress=False)
    measured = np.array([state.means[1] - state.means[0] for state in truth])
    found = (frame["measured_without"] - frame["measured_with"]).to_numpy()
    assert np.corrcoef(found, measured)[0, 1] > 0.95
    assert 0.8 < (found * measured).sum() / (found**2).sum() < 1.25
    mu, first = frame["mu"].to_numpy(), frame["first_order"].to_numpy()
    assert (mu > 0).all()
    assert (first < 0).any()
    agree = [
        low <= state.measured_interval[1] and high >= state.measured_interval[0]
        for (low, high), state in zip(frame.select("ci_low", "ci_high").iter_rows(), truth, strict=True)
    ]
    assert sum(agree) >= 9
    assert frame["group"].to_list() == sorted(run.samples()["label"].unique().to_list())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subsets": None}, InputError, "give subsets, .* or groups"),
        ({"groups": "label"}, InputError, "give subsets, .* or groups"),
        ({"subsets": None, "groups": "nope"}, InputError, "unknown group column 'nope'"),
        ({"subsets": {"all": list(range(N))}}, InputError, "whole training set"),
        ({"subsets": {"none": []}}, InputError, "empty"),
        ({"subsets": {"odd": [99]}}, InputError, "99 is not in the run"),
        ({"queries": {"one": queries()["one"]}}, InputError, "recorded for the queries"),
        ({"dataset": torch.utils.data.Subset(dataset(), range(20))}, InputError, "recorded on 23 samples"),
        ({"task": fi.ClassificationTask(label_smoothing=0.1)}, ReplayError, "with all samples the re-executed"),
    ],
    ids=lambda value: "",
)
def test_bad_input(tmp_path: Path, changes: dict[str, Any], error: Any, message: str) -> None:
    run = train(tmp_path / "run")
    with pytest.raises(error, match=message):
        leave_out(run, **changes)


def test_a_query_whose_adjoint_diverged_is_left_out(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    manifest = json.loads(path.read_text())
    manifest["replay"]["diverged"] = {"one": "the adjoint of 'one' diverged"}
    path.write_text(json.dumps(manifest))
    assert leave_out(run)["query"].unique().to_list() == ["several"]
    manifest["replay"]["diverged"]["several"] = "so did this"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ReplayError, match="adjoints of all queries"):
        leave_out(run)


def test_runs_that_cannot_be_taken_again(tmp_path: Path) -> None:
    live = train(tmp_path / "live", sensitivity="live")
    with pytest.raises(InputError, match="no finished replay"):
        leave_out(live)
    bare = train(tmp_path / "bare")
    with pytest.raises(InputError, match="does not say how its data and model are made"):
        bare.leave_out(subsets=SUBSETS)


def test_a_training_that_diverges_without_the_subset_says_so(tmp_path: Path) -> None:
    class Explosive(fi.ClassificationTask):
        """Its losses are finite only as long as every batch has met row 3 in time."""

        def losses(self, model: Any, batch: Any) -> torch.Tensor:
            values = super().losses(model, batch)
            return values * torch.where(model[0].weight.detach().norm() > limit, torch.inf, 1.0)

    limit = torch.inf
    run = train(tmp_path / "run", task=Explosive())
    limit = 1e-3
    with pytest.raises(RecordingError, match="the training loss is"):
        leave_out(run, task=Explosive())
