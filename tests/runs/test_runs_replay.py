"""Replayed signals against brute force: retrain with one sample's weight moved at one step, and difference.

Protects: calibration. A signal is the derivative of the final measurement through everything that the training does.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import polars as pl
import pytest
import replay_problems as problems
import torch

import finfluence as fi
from finfluence.errors import InputError
from finfluence.runs import ReplayOptions
from finfluence.runs.panel import NoisePanel
from finfluence.runs.plan import Schedule
from finfluence.runs.sampling import Sampler

PLACES = [(0, 1), (3, 0), (4, 2), (9, 1), (14, 2)]  # first, both sides of a stored state, ragged last batches

CASES = {
    "sgd": {},
    "weight decay": {"optimizer": fi.SGD(lr=0.5, weight_decay=0.05)},
    "momentum": {"optimizer": fi.SGD(lr=0.2, momentum=0.9, dampening=0.1, weight_decay=0.02)},
    "nesterov": {"optimizer": fi.SGD(lr=0.2, momentum=0.9, nesterov=True)},
    "adam": {"optimizer": fi.Adam(lr=0.05, weight_decay=0.1)},
    "adamw": {"optimizer": fi.AdamW(lr=0.05, weight_decay=0.1, betas=(0.8, 0.95))},
    "schedule": {"schedule": Schedule("cosine", warmup_steps=3), "optimizer": fi.SGD(lr=0.5, momentum=0.8)},
    "accumulation": {"accumulation": 2},
    "clip": {"clip_norm": 0.3, "optimizer": fi.SGD(lr=0.5, momentum=0.5)},
    "clip adamw": {"clip_norm": 0.3, "optimizer": fi.AdamW(lr=0.05)},
    "drop last": {"sampler": Sampler("shuffled", drop_last=True), "epochs": 4},
    "with replacement": {"sampler": "with-replacement"},
}


@pytest.mark.parametrize("name", CASES)
def test_signals_are_the_derivative_of_the_run(tmp_path, name):
    run = problems.train(tmp_path / "run", **CASES[name])
    # Adam's first step is a sign of each element, with jumps wherever a gradient is near 0
    places = PLACES if "adam" not in name else PLACES[1:]
    problems.check_against_brute_force(run, places, tolerance=2e-6)
    assert run.manifest["replay"]["largest_mismatch"] == 0.0


def test_dropout_is_replayed_with_accumulation(tmp_path):
    run = problems.train(tmp_path / "run", model=problems.mlp(dropout=0.4), accumulation=2)
    problems.check_against_brute_force(run, PLACES, tolerance=2e-6, make=lambda: problems.mlp(dropout=0.4))


def test_poisson_batches_with_an_empty_one(tmp_path):
    """Seed 3: sizes vary, and one of the steps has no sample; the weight of a sample stays 1/b."""
    sampler = {"sampler": "poisson", "batch_size": 3, "epochs": 2, "optimizer": fi.SGD(lr=0.2, momentum=0.8)}
    run = problems.train(tmp_path / "run", **sampler)
    sizes = run.steps()["batch_size"].to_list()
    empty = sizes.index(0)
    assert 0 < empty < len(sizes) - 1
    assert run.signals().filter(pl.col("step") == empty).collect().is_empty()
    places = [(step, 0) for step in (empty - 1, empty + 1, len(sizes) - 1) if sizes[step]]
    problems.check_against_brute_force(run, places, tolerance=2e-6)


def test_the_panel_is_what_a_sample_would_have_had(tmp_path):
    """Adding row j to a step's batch with weight size/b: its panel value is the derivative by size."""
    run = problems.train(tmp_path / "run", optimizer=fi.SGD(lr=0.3, momentum=0.8))
    panel = run.signals(table="panel").collect()
    assert panel.select("step", "sample").is_duplicated().sum() == 0
    assert panel["sample"].n_unique() == 6
    assert panel["step"].n_unique() == 6  # two positions in each of three epochs
    rows = panel.sample(4, seed=0)
    for row in rows.iter_rows(named=True):
        expected = problems.brute_force(run, row["step"], row=row["sample"])
        np.testing.assert_allclose([row["several"], row["one"]], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("method", "tolerance"), [("one-sided", 1e-4), ("central", 1e-6)])
@pytest.mark.parametrize("optimizer", [fi.SGD(lr=0.3, momentum=0.9), fi.AdamW(lr=0.05)], ids=["momentum", "adamw"])
def test_difference_products(tmp_path, method, tolerance, optimizer):
    common = {"optimizer": optimizer, "model": problems.mlp(dropout=0.3), "accumulation": 2}
    exact = problems.train(tmp_path / "exact", **common, replay_options=ReplayOptions(hessian="exact"))
    common["model"] = problems.mlp(dropout=0.3)
    other = problems.train(tmp_path / "other", **common, replay_options=ReplayOptions(hessian=method))
    for table in ("signals", "panel"):
        for step in (0, 5, 14):
            expected = problems.step_signals(exact, step, table=table)
            if len(expected):
                scale = np.abs(expected).max(axis=0)
                assert (np.abs(problems.step_signals(other, step, table=table) - expected) / scale).max() < tolerance


def test_kinks_count_where_there_are_any(tmp_path):
    """By default ReLU's kinks have curvature, by every kind of Hessian-vector product; a smooth network has none."""

    def relu() -> torch.nn.Module:
        model = problems.mlp()
        model[1] = torch.nn.ReLU()
        return model

    for name, make, kinked in (("tanh", problems.mlp, False), ("relu", relu, True)):
        sharp, usual, central, one_sided = (
            problems.train(tmp_path / f"{name}-{k}", model=make(), replay_options=options)
            for k, options in enumerate(
                (
                    ReplayOptions(smoothing=0),
                    ReplayOptions(),
                    ReplayOptions(hessian="central"),
                    ReplayOptions(hessian="one-sided"),
                )
            )
        )
        assert usual.manifest["replay"]["options"]["smoothing"] == 0.25
        first = problems.step_signals(usual, 0)
        scale = np.abs(first).max()
        if kinked:
            assert np.abs(problems.step_signals(sharp, 0) - first).max() > 0.02 * scale
            # the slopes whose differences are taken are smooth in what is not curvature, too
            for run in (central, one_sided):
                assert np.abs(problems.step_signals(run, 0) - first).max() < 0.1 * scale
        else:
            np.testing.assert_array_equal(problems.step_signals(sharp, 0), first)
            assert np.abs(problems.step_signals(central, 0) - first).max() < 1e-4 * scale


def test_adam_spreads_kinks_less(tmp_path):
    run = problems.train(tmp_path / "run", optimizer=fi.AdamW(lr=0.01))
    assert run.manifest["replay"]["options"]["smoothing"] == 0.1


def test_live_signals_beside_a_replay_and_what_was_trained(tmp_path):
    """The last step's live and replayed signals nearly agree: nothing but its own curvature lies between them.

    Training is that of the live run bit for bit, and the model is handed back as trained.
    """
    live_model, model = problems.mlp(), problems.mlp()
    live = problems.train(tmp_path / "live", model=live_model, sensitivity="live", replay_options=None)
    both = problems.train(tmp_path / "both", model=model, sensitivity="both")
    for one, other in zip(live_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    np.testing.assert_array_equal(problems.step_signals(both, 7, table="live"), problems.step_signals(live, 7))
    replayed, recorded = problems.step_signals(both, 14), problems.step_signals(both, 14, table="live")
    assert np.corrcoef(replayed[:, 0], recorded[:, 0])[0, 1] > 0.9
    assert not np.allclose(replayed, recorded)
    assert both.influence("one", sensitivity="live").height == problems.N


def test_the_identity_and_the_adjoint_are_on_record(tmp_path):
    run = problems.train(tmp_path / "run", clip_norm=0.3, replay_options=ReplayOptions())
    table = run.adjoints()
    assert table.columns == ["step", "query", "norm", "residual"]
    assert table["step"].to_list() == [step for step in range(15) for _ in range(2)]
    assert (table["norm"] > 0).all()
    assert (table["residual"] < 1e-12).all()
    assert run.manifest["replay"]["largest_residual"] == table["residual"].max()


def test_several_queries_give_what_each_gives_alone(tmp_path):
    """Also an aggregate: the mean of single-example queries has the mean of their signals."""
    inputs, targets = problems.queries()["several"]
    asked = {f"q{k}": (inputs[k : k + 1], targets[k : k + 1]) for k in range(3)} | {"all": (inputs, targets)}
    together = problems.train(tmp_path / "together", queries=asked)
    alone = problems.train(tmp_path / "alone", queries={"q1": asked["q1"]})
    for step in (0, 8, 14):
        values = problems.step_signals(together, step)
        np.testing.assert_allclose(values[:, 1:2], problems.step_signals(alone, step), rtol=1e-6)
        np.testing.assert_allclose(values[:, :3].mean(axis=1), values[:, 3], rtol=1e-5, atol=1e-9)


def test_full_signals_evaluate_every_sample_and_influence_uses_them(tmp_path):
    batch = problems.train(tmp_path / "batch", panel=NoisePanel(6, 3))
    full = problems.train(tmp_path / "full", signals="full", panel=NoisePanel(6, 3))
    panel = full.signals(table="panel").collect()
    assert panel.height == 3 * 3 * problems.N  # epochs × positions × samples
    small = batch.signals(table="panel").collect()
    joined = small.join(panel, on=["step", "sample"], suffix="_full")
    assert joined.height == small.height  # the same grid, and the same values on it
    np.testing.assert_allclose(joined["one"], joined["one_full"], rtol=1e-6)
    signals, expected = full.influence("one", estimator="tracin"), batch.influence("one", estimator="tracin")
    assert not np.allclose(signals["mu"], expected["mu"])
    assert full.influence("one")["se"].to_numpy().max() < batch.influence("one")["se"].to_numpy().max()


@pytest.mark.parametrize(
    ("epochs", "measured"),
    [
        ((1, 3), (1, 3)),
        ("second-half", (1, 2, 3)),
        ((3.0,), (3,)),
        ((0.4, 1.6, 3), (0.4, 1.6, 3)),
        ("throughout", (0.5, 1, 1.5, 2, 2.5, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [fi.SGD(lr=0.2, momentum=0.8), fi.AdamW(lr=0.02)], ids=["sgd", "adamw"])
def test_a_mean_over_epochs(tmp_path, epochs, measured, optimizer):
    """Signals are the derivative of the mean of what is measured after several epochs."""
    options = fi.runs.ReplayOptions(
        damping=0.0, second_moment="exact", clip_derivative="exact", hessian="exact", measure_epochs=epochs
    )
    # dropout shows that the queries' gradients are taken in evaluation mode and leave the random states alone
    net = functools.partial(problems.mlp, dropout=0.3)
    run = problems.train(tmp_path / "run", model=net(), optimizer=optimizer, replay_options=options)
    assert run.measured_epochs == measured
    assert fi.open_run(tmp_path / "run").measured_epochs == measured
    said = fi.influence.metadata(run.influence("one"))
    assert said.get("measured_epochs") == (None if len(measured) == 1 else list(measured))
    assert said["path_noise"] == (2.0 if isinstance(optimizer, fi.AdamW) else 1.5)
    problems.check_against_brute_force(run, [(1, 2), (4, 2), (5, 0), (9, 1), (14, 0)], tolerance=1e-5, make=net)


def test_steep_measurements_on_the_way_are_not_taken_for_growth(tmp_path):
    """What growth is measured against holds them, also where a replay goes on."""
    # twelve epochs fit the data, so that the loss is steeper after the first than at the end
    options = dataclasses.replace(problems.EXACT, measure_epochs=(1, 12))
    asked = {"train": problems.dataset()}
    run = problems.train(tmp_path / "run", queries=asked, epochs=12, replay_options=options)
    replayed = run.manifest["replay"]
    assert replayed["reference"][0] > 1.2 * replayed["norms"][0]


def test_what_is_measured_is_checked_and_part_of_the_replay(tmp_path):
    for wrong in ((), (0, 3), (2, 1), (1, 1.0), (float("nan"), 3), "last"):
        with pytest.raises(InputError, match="increasing numbers of epochs"):
            fi.runs.ReplayOptions(measure_epochs=wrong)
    run = problems.train(tmp_path / "run")
    assert run.measured_epochs == (3,)

    def again(epochs):
        return fi.runs.replay(
            tmp_path / "run",
            problems.TASK,
            problems.mlp(),
            dataset=problems.dataset(),
            queries=problems.queries(),
            options=dataclasses.replace(problems.EXACT, measure_epochs=epochs),
            show_progress="never",
        )

    with pytest.raises(InputError, match="end with it"):
        again((1, 2))
    with pytest.raises(InputError, match=r"an epoch has 5 steps, too few to measure after epochs 0\.96, 1, 3"):
        again((0.96, 1, 3))
    before = problems.step_signals(run, 0)
    mean = again([2, 3])
    assert mean.measured_epochs == (2, 3)
    assert not np.allclose(problems.step_signals(mean, 0), before)
    end = again(None)
    assert end.measured_epochs == (3,)
    np.testing.assert_array_equal(problems.step_signals(end, 0), before)
