"""What a replay does when something is wrong: another run than the recorded one, divergence, a kill.

Protects: that no score which is not the derivative of the recorded run is ever returned.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import replay_problems as problems
import torch
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError, ReplayError
from finfluence.runs import ReplayOptions, plan_replay
from finfluence.signals._files import LocalFolder

OTHER = ReplayOptions(hessian="one-sided")


def replay(directory, *, model=None, data=None, options=OTHER, queries=None):
    return fi.replay(
        directory,
        problems.TASK,
        model or problems.mlp(),
        dataset=data or problems.dataset(),
        queries=queries or problems.queries(),
        options=options,
    )


def signals(run, table="signals"):
    frame = run.signals(table=table).collect()
    return frame.sort([c for c in ("step", "sample") if c in frame.columns])


def _changed_data(rows=(7,)):
    inputs, targets = problems.dataset().tensors
    inputs = inputs.clone()
    inputs[list(rows)] += 1e-3
    return TensorDataset(inputs, targets)


def test_changed_data_stop_the_replay_and_leave_no_scores(tmp_path):
    run = problems.train(tmp_path / "run")
    assert run.influence("one").height == problems.N
    with pytest.raises(ReplayError, match=r"differ from the recorded ones by \d.*losses differ from step \d+ on.*data"):
        replay(tmp_path / "run", data=_changed_data())
    with pytest.raises(InputError, match="is not finished"):
        fi.open_run(tmp_path / "run").influence("one")


def test_another_dropout_or_mode_stop_the_replay(tmp_path):
    problems.train(tmp_path / "run", model=problems.mlp(dropout=0.3))
    with pytest.raises(ReplayError, match="the model is built differently or is in another mode"):
        replay(tmp_path / "run", model=problems.mlp(dropout=0.31))
    with pytest.raises(ReplayError, match="limit 1e-12"):
        replay(tmp_path / "run", model=problems.mlp(dropout=0.3).eval())


def test_a_small_difference_is_accepted_on_request(tmp_path):
    """As another machine would give: every stored state off by 1e-9."""
    reference = problems.train(tmp_path / "run", replay_options=OTHER)
    before = signals(reference)
    data = TensorDataset(problems.dataset().tensors[0] * (1 + 1e-9), problems.dataset().tensors[1])
    with pytest.raises(ReplayError, match=r"raise ReplayOptions\.tolerance"):
        replay(tmp_path / "run", data=data, options=ReplayOptions())
    run = replay(tmp_path / "run", data=data, options=ReplayOptions(tolerance=1e-6))
    assert 1e-12 < run.manifest["replay"]["largest_mismatch"] < 1e-6
    np.testing.assert_allclose(signals(run)["one"], before["one"], rtol=1e-4, atol=1e-7)


def test_a_loss_with_its_own_randomness_is_named(tmp_path):
    generator = torch.Generator().manual_seed(0)

    class Noisy(fi.ClassificationTask):
        noise = False

        def losses(self, model, batch):
            own = super().losses(model, batch)
            return own + 0.5 * torch.rand(len(own), generator=generator) if self.noise else own

    task = Noisy()
    problems.train(tmp_path / "run", task=task)
    task.noise = True  # an offset of the loss: it changes no gradient, so the parameters agree
    with pytest.raises(ReplayError, match=r"the loss of step 14 was .* random source of its own"):
        fi.replay(
            tmp_path / "run",
            task,
            problems.mlp(),
            dataset=problems.dataset(),
            queries=problems.queries(),
            options=ReplayOptions(hessian="exact"),
        )


def test_wrong_arguments_are_refused(tmp_path):
    problems.train(tmp_path / "live", sensitivity="live", replay_options=None)
    with pytest.raises(ReplayError, match="was not recorded for a replay"):
        replay(tmp_path / "live")
    problems.train(tmp_path / "run")
    with pytest.raises(InputError, match="recorded on 23 samples, the dataset has 22"):
        replay(tmp_path / "run", data=TensorDataset(*(t[:22] for t in problems.dataset().tensors)))
    with pytest.raises(InputError, match="recorded for the queries"):
        replay(tmp_path / "run", queries={"one": problems.queries()["one"]})
    with pytest.raises(ReplayError, match="on one side only"):
        replay(tmp_path / "run", model=torch.nn.Linear(problems.FEATURES, 3).double())
    bad: list[tuple[str, Any]] = [("hessian", "diagonal"), ("divergence", 1.0), ("caution", 0), ("damping", -1.0)]
    for name, value in [
        *bad,
        ("second_moment", "none"),
        ("clip_derivative", 1),
        ("tolerance", 0),
        ("memory_bytes", -1),
        ("smoothing", -0.1),
        ("smoothing", math.inf),
    ]:
        with pytest.raises(InputError, match=name):
            ReplayOptions(**{name: value})


def _diverging(tmp_path, asked, *, divergence=30.0, caution=math.inf, **options):
    """A linear model y = w·x with an unstable learning rate along the first input and a stable one along the second.

    Step factors are (1 − 2·lr·mean of x_k²): about −1.4 along the first, 0.98 along the second.
    """
    inputs = torch.zeros(20, 2, dtype=torch.float64)
    inputs[::2, 0], inputs[1::2, 1] = 1.55, 0.14
    data = TensorDataset(inputs, torch.zeros(20, 1, dtype=torch.float64))
    model = torch.nn.Linear(2, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 1e-3)
    return fi.train(
        fi.RegressionTask(),
        model,
        data,
        queries=asked,
        optimizer=fi.SGD(lr=1.0),
        epochs=16,
        batch_size=10,
        seed=0,
        directory=tmp_path,
        sensitivity="replay",
        checkpoint_every=4,
        panel=fi.runs.NoisePanel(4, 2),
        replay_options=ReplayOptions(divergence=divergence, caution=caution, **options),
    )


def _query(*x, scale=1.0):
    return torch.tensor([x], dtype=torch.float64) * scale, torch.ones(1, 1, dtype=torch.float64)


def test_a_diverging_query_has_no_scores_and_the_others_have(tmp_path):
    """The monitor knows nothing of sizes: a query with a tiny gradient is judged by its own growth alone."""
    asked = {"stable": _query(0.0, 1.0), "tiny": _query(0.0, 1.0, scale=1e-9), "unstable": _query(1.0, 0.0)}
    with pytest.warns(FinfluenceWarning, match=r"'unstable' has norm .*'unstable' has no scores, the other"):
        run = _diverging(tmp_path / "run", asked)
    assert list(run.manifest["replay"]["diverged"]) == ["unstable"]
    for table in ("signals", "panel"):
        assert run.signals(table=table).collect()["unstable"].is_nan().all()
    alone = _diverging(tmp_path / "alone", {"stable": asked["stable"]})
    np.testing.assert_array_equal(signals(run)["stable"], signals(alone)["stable"])
    assert run.influence("stable")["mu"].is_finite().all()
    assert run.influence("tiny")["mu"].is_finite().all()
    with pytest.raises(ReplayError, match=r"'unstable' has norm .* lower the learning rate.*replay again"):
        run.influence("unstable")
    norms = run.adjoints().filter(pl.col("query") == "unstable").sort("step")["norm"]
    assert norms[0] == 0.0  # given up
    assert norms[-1] > 0.0


def test_a_query_that_was_given_up_does_not_come_back_with_an_earlier_measurement(tmp_path):
    asked = {"stable": _query(0.0, 1.0), "unstable": _query(1.0, 0.0)}
    with pytest.warns(FinfluenceWarning, match="'unstable' has no scores"):
        run = _diverging(tmp_path / "run", asked, measure_epochs=(2, 16))
    norms = run.adjoints().filter(pl.col("query") == "unstable").sort("step", descending=True)["norm"]
    given_up = int((norms == 0.0).arg_max() or 0)
    assert 0 < given_up < len(norms) - 4  # before epoch 2 is reached, two steps an epoch
    assert (norms[given_up:] == 0.0).all()


def test_if_every_query_diverges_nothing_is_left(tmp_path):
    with pytest.raises(ReplayError, match=r"'unstable' has norm .*it diverges"):
        _diverging(tmp_path / "run", {"unstable": _query(1.0, 0.0)})
    run = fi.open_run(tmp_path / "run")
    assert run.manifest["status"] == "failed"
    assert run.signals().collect().is_empty()
    with pytest.raises(InputError, match="is not finished"):
        run.influence("unstable")
    # a growth that is known to be harmless can be accepted
    run = _diverging(tmp_path / "accepted", {"unstable": _query(1.0, 0.0)}, divergence=math.inf)
    assert signals(run)["unstable"].is_finite().all()


def test_growth_is_warned_of_below_divergence(tmp_path):
    with pytest.warns(FinfluenceWarning, match="scores may be unreliable"):
        _diverging(tmp_path / "run", {"unstable": _query(1.0, 0.0)}, divergence=1e9, caution=5.0)


@pytest.mark.parametrize("optimizer", [fi.SGD(lr=0.3, momentum=0.9), fi.AdamW(lr=0.02)], ids=["momentum", "adamw"])
def test_a_spilled_segment_gives_the_same(tmp_path, optimizer):
    row = 4 * 8 * sum(p.numel() for p in problems.mlp().parameters())  # a step's four vectors in float64
    for name, budget in (("memory", None), ("file", 0), ("both", 2 * row)):
        problems.train(
            tmp_path / name,
            optimizer=optimizer,
            clip_norm=0.3,
            replay_options=ReplayOptions(memory_bytes=budget, clip_derivative="exact"),
        )
    for name in ("file", "both"):
        assert signals(fi.open_run(tmp_path / "memory")).equals(signals(fi.open_run(tmp_path / name)))
    whole, file = (
        plan_replay(tmp_path / "memory", problems.mlp(), options=ReplayOptions(memory_bytes=budget))
        for budget in (None, 0)
    )
    assert file.spills
    assert "in a file" in str(file)
    assert not whole.spills
    assert file.memory_bytes + file.file_bytes == whole.memory_bytes


def test_the_plan_counts_what_is_done(tmp_path):
    problems.train(tmp_path / "run")
    plan = plan_replay(tmp_path / "run", problems.mlp(), options=ReplayOptions(hessian="central"))
    assert (plan.steps, plan.segments, plan.queries, plan.panel_evaluations) == (15, 4, 2, 6 * 2 * 3)
    assert plan.gradients == 15 * (2 + 2 * 2) + 36 / 5
    size = sum(p.numel() for p in problems.mlp().parameters()) * 8
    assert plan.memory_bytes == 4 * size + 2 * 3 * size
    assert "15 steps in 4 segments, 2 queries, Hessian products central" in str(plan)


def test_the_plan_is_printed_before_the_replay_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    problems.train(tmp_path / "run")
    assert "replay: 15 steps in 4 segments" in capsys.readouterr().err
    problems.train(tmp_path / "quiet", show_progress="never")
    assert capsys.readouterr().err == ""


def test_a_finished_replay_is_not_repeated_and_other_options_or_queries_start_anew(tmp_path):
    run = problems.train(tmp_path / "run")
    exact = signals(run)
    before = [os.stat(p).st_mtime_ns for p in sorted((tmp_path / "run" / "signals").iterdir())]
    replay(tmp_path / "run", options=problems.EXACT)
    assert before == [os.stat(p).st_mtime_ns for p in sorted((tmp_path / "run" / "signals").iterdir())]
    again = signals(replay(tmp_path / "run", options=OTHER))
    assert not again.equals(exact)
    np.testing.assert_allclose(again["one"], exact["one"], rtol=1e-4, atol=1e-6)
    assert signals(replay(tmp_path / "run", options=problems.EXACT)).equals(exact)
    moved = {name: (x + 0.1, y) for name, (x, y) in problems.queries().items()}
    assert not np.allclose(
        signals(replay(tmp_path / "run", options=problems.EXACT, queries=moved))["one"], exact["one"]
    )


CHILDREN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import replay_problems as problems
import finfluence as fi
from finfluence.runs import replaying
from finfluence.signals._files import LocalFolder

replaying.COMMIT_SECONDS = 0.0
written = dict(counting=False, left=0)

def deadly(function):
    def wrapper(self, name, *rest):
        if written["counting"] and not name.startswith("run.json"):
            written["left"] -= 1
            if written["left"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(self, name, *rest)
    return wrapper

LocalFolder._write, LocalFolder.remove = deadly(LocalFolder._write), deadly(LocalFolder.remove)
original = replaying._Replay.run

def run(self, show):
    written["counting"] = True
    return original(self, show)

replaying._Replay.run = run
directory, kill = Path(sys.argv[2]), int(sys.argv[3])
written["left"] = kill
problems.train(directory, optimizer=fi.SGD(lr=0.3, momentum=0.9))
"""


@pytest.mark.timeout(120)
def test_a_killed_replay_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    """SIGKILL at the k-th write or removal of the replay (chosen with seed 0): then `replay`, or `train` with resume.

    A commit is five such operations and there are four, so the kills hit every kind. Parts of other lengths than the
    killed process wrote, because the resumed one commits once.
    """
    optimizer = fi.SGD(lr=0.3, momentum=0.9)
    expected = problems.train(tmp_path / "whole", optimizer=optimizer)
    kills = sorted(np.random.default_rng(0).choice(np.arange(1, 20), 3, replace=False).tolist())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILDREN, str(Path(__file__).parent), str(tmp_path / f"k{kill}"), str(kill)]
        )
        for kill in kills
    ]
    for child in children:
        assert child.wait() == -signal.SIGKILL
    steps = []
    from finfluence.runs._segment import SegmentWalker

    original = SegmentWalker.backwards

    def counting(self, batches, *rest, **named):
        steps.extend(b.step for b in batches)
        return original(self, batches, *rest, **named)

    monkeypatch.setattr(SegmentWalker, "backwards", counting)
    for kill in kills:
        directory = tmp_path / f"k{kill}"
        with pytest.warns(FinfluenceWarning, match="interrupted"):
            partial = fi.open_run(directory, partial=True)
        with pytest.raises(InputError, match="not finished"):
            partial.influence("one")
        steps.clear()
        if kill == kills[-1]:
            run = problems.train(directory, optimizer=optimizer, exist="resume")
        else:
            run = replay(directory, options=problems.EXACT)
        assert len(steps) == len(set(steps)) == (15 if kill <= 5 else len(steps))
        assert kill <= 5 or len(steps) < 15
        for table in ("signals", "panel"):
            assert signals(run, table).equals(signals(expected, table))
        assert run.adjoints().equals(expected.adjoints())
        assert not LocalFolder(directory).names("adjoint-states")
