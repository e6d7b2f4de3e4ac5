"""`open_run` and `Run.influence`: the numbers are those of the formulas, and what cannot be answered is said."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from runs_problems import N, record

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.influence import metadata, two_stage
from finfluence.workflows.digits import digits

SAMPLES = 200
BATCH = 20
EPOCHS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fi.Run:
    """A recorded run on digits with flipped labels, replay and live."""
    recipe = digits(samples=SAMPLES, epochs=EPOCHS, batch_size=BATCH, hidden=16)
    return recipe.train(
        tmp_path_factory.mktemp("runs") / "digits",
        sensitivity="both",
        panel=fi.NoisePanel(samples=SAMPLES, positions=SAMPLES // BATCH),
        show_progress="never",
    )


def matrices(run: fi.Run, table: Any = "signals") -> tuple[np.ndarray, np.ndarray]:
    """Step and value of every sample in every epoch, both (n, epochs)."""
    frame = (
        run.signals(table=table).collect().join(run.steps().select("step", "epoch"), on="step").sort("sample", "epoch")
    )
    shape = (SAMPLES, EPOCHS)
    return frame["step"].to_numpy().reshape(shape), frame["validation"].to_numpy().reshape(shape).astype(np.float64)


def naive_shift(run: fi.Run, members: list[int], table: Any = "signals") -> float:
    """Δ_S = −Σ (x − mean of the others in the batch)·(n − 1)/(n − s)."""
    steps, values = matrices(run, table)
    total = 0.0
    for sample in members:
        for step, value in zip(steps[sample], values[sample], strict=True):
            batch = values[steps == step]
            total -= value - (batch.sum() - value) / (len(batch) - 1)
    return total * (SAMPLES - 1) / (SAMPLES - len(members))


def naive_unit(run: fi.Run, members: list[int]) -> float:
    """Pooled sd of training with and without the members, whose batches are n/(n − s) times smaller."""
    return naive_sigma(run) * ((1 + SAMPLES / (SAMPLES - len(members))) / 2) ** 0.5


def naive_sigma(run: fi.Run) -> float:
    """σ² = Σ over epochs of b/(n − 1)·Σ d², d the doubly centred matrix of every sample at every position."""
    variance = 0.0
    for _, panel in run.store.panel().collect().group_by("epoch"):
        matrix = panel.sort("sample", "position")["validation"].to_numpy().astype(np.float64).reshape(SAMPLES, -1)
        centred = matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()
        variance += BATCH / (SAMPLES - 1) * (centred**2).sum()
    return variance**0.5


def test_samples_subsets_and_groups_equal_a_naive_computation(run: fi.Run) -> None:
    samples = run.influence("validation")
    assert samples.columns == ["sample", "mu", "se", "ci_low", "ci_high", "p_value", "q_value"]
    assert samples["sample"].to_list() == list(range(SAMPLES))
    for sample in (0, 17, 199):
        assert samples["mu"][sample] == pytest.approx(naive_shift(run, [sample]) / naive_unit(run, [sample]), rel=1e-4)
    subsets = {"one": [3, 4, 5, 90], "two": list(range(50, 80))}
    table = run.influence("validation", subsets=subsets)
    assert table["subset"].to_list() == ["one", "two"]
    assert table["size"].to_list() == [4, 30]
    for row, members in enumerate(subsets.values()):
        assert table["mu"][row] == pytest.approx(naive_shift(run, members) / naive_unit(run, members), rel=1e-4)
    groups = run.influence("validation", groups="planted")
    planted = run.samples().filter("planted")["sample"].to_list()
    assert groups["group"].to_list() == [False, True]
    assert groups["size"].to_list() == [SAMPLES - len(planted), len(planted)]
    assert groups["mu"][1] == pytest.approx(naive_shift(run, planted) / naive_unit(run, planted), rel=1e-4)
    assert groups["mu"][1] < 0


def test_kriged_shifts_and_the_derivatives_error(tmp_path: Path) -> None:
    """Kriged and plain μ differ, agree in rank and say which they are; the error widens intervals and moves nothing."""
    recipe = digits(samples=SAMPLES, epochs=EPOCHS, batch_size=BATCH, hidden=16)
    own = recipe.train(
        tmp_path / "run",
        sensitivity="replay",
        panel=fi.NoisePanel(samples=40, positions=5),
        show_progress="never",
    )
    kriged, plain = own.influence("validation"), own.influence("validation", shifts="plain")
    assert (metadata(kriged)["shifts"], metadata(plain)["shifts"]) == ("kriged", "plain")
    assert (metadata(kriged)["path_noise"], metadata(kriged)["relative_error"]) == (1.5, 0.1)
    assert 0.8 < np.corrcoef(kriged["mu"], plain["mu"])[0, 1] < 0.9999
    on_path = own.influence("validation", derivative_error=0.0)
    assert on_path["mu"].equals(kriged["mu"])
    assert (on_path["se"] < kriged["se"]).all()
    assert on_path["se"].mean() < own.influence("validation", shifts="plain", derivative_error=0.0)["se"].mean()
    for wrong in ({"shifts": "kriging"}, {"derivative_error": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            own.influence("validation", **wrong)
    adam = digits(samples=SAMPLES, epochs=2, batch_size=BATCH, hidden=16, optimizer="adamw")
    under_adam = adam.train(tmp_path / "adam", sensitivity="both", show_progress="never")
    single = metadata(under_adam.influence("validation"))
    # after two of three epochs paths are not as far apart as they get
    assert single["path_noise"] == pytest.approx(2.0 * (2 / 3) ** 0.5)
    assert single["relative_error"] == pytest.approx(np.hypot(0.4, 0.1))
    group = under_adam.influence("validation", subsets={"ten": range(10)}, shared=True)
    assert metadata(group)["relative_error"] == 0.1
    assert 0.1 * abs(group["mu"][0]) < group["se_shared"][0] < group["se"][0]
    live = metadata(under_adam.influence("validation", sensitivity="live"))
    assert (live["path_noise"], live["relative_error"]) == (0.0, 0.0)


def test_live_signals_and_tracin_equal_a_naive_computation(run: fi.Run) -> None:
    _, values = matrices(run)
    tracin = run.influence("validation", estimator="tracin")
    np.testing.assert_allclose(tracin["mu"].to_numpy(), -values.sum(1), rtol=1e-5, atol=1e-9)
    assert tracin["se"].null_count() == SAMPLES
    _, live = matrices(run, "live")
    np.testing.assert_allclose(
        run.influence("validation", estimator="tracin", sensitivity="live")["mu"].to_numpy(),
        -live.sum(1),
        rtol=1e-5,
        atol=1e-9,
    )
    table = run.influence("validation", sensitivity="live")
    ratio = table["mu"][0] / naive_shift(run, [0], "live")
    assert table["mu"][17] == pytest.approx(naive_shift(run, [17], "live") * ratio, rel=1e-4)
    assert not np.allclose(live, values)


@pytest.mark.parametrize("estimator", ["max", "median", "two-stage-gaussian", "clopper-pearson"])
def test_two_stage_estimators(run: fi.Run, estimator: Any) -> None:
    members = list(range(40, 100))
    steps, values = matrices(run)
    o_with, o_without = [], []
    inside = np.isin(np.arange(SAMPLES), members)
    for step in range(EPOCHS * SAMPLES // BATCH):
        here = steps == step
        rest = values[here & ~inside[:, None]]
        o_with.append(values[here].sum())
        o_without.append(rest.sum() * BATCH / len(rest))
    rule = estimator.removeprefix("two-stage-")
    table = run.influence("validation", subsets={"s": members}, estimator=estimator)
    assert table["mu"].item() == pytest.approx(two_stage(o_with, o_without, rule=rule).mu, rel=1e-4)
    if estimator == "two-stage-gaussian":  # the rules over thresholds take half a second an estimate
        by_group = run.influence("validation", groups="label", estimator=estimator)
        assert by_group.columns[:2] == ["group", "size"]
        assert by_group.height == 10
        assert run.influence("validation", estimator=estimator).height == SAMPLES


def test_reporting_and_metadata(run: fi.Run) -> None:
    both, harmful = run.influence("validation"), run.influence("validation", alternative="harmful", level=0.5)
    assert both["mu"].equals(harmful["mu"])
    down = both["mu"] < 0
    np.testing.assert_allclose(harmful.filter(down)["p_value"].to_numpy() * 2, both.filter(down)["p_value"].to_numpy())
    assert (harmful["ci_high"] - harmful["ci_low"] < both["ci_high"] - both["ci_low"]).all()
    meta = both.finfluence.meta  # pyright: ignore[reportAttributeAccessIssue]
    assert meta["sign"] == fi.SIGN_CONVENTION
    assert (meta["query"], meta["sensitivity"]) == ("validation", "replay")
    assert fi.SIGN_CONVENTION in str(run)
    assert "100 steps" not in repr(run)
    assert f"{EPOCHS * SAMPLES // BATCH} steps, {SAMPLES} samples, queries validation, both" in repr(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": "test"}, "unknown query 'test'; .* has 'validation'"),
        ({"estimator": "shapley"}, "unknown estimator 'shapley'; choose one of gaussian, tracin, max"),
        ({"sensitivity": "both"}, "unknown sensitivity 'both'; choose run or live"),
        ({"subsets": {"s": []}}, "subset 's' is empty"),
        ({"subsets": {"s": range(SAMPLES)}}, "subset 's' .*whole training set"),
        ({"subsets": {"s": [1, 1]}}, "subset 's'.* 1 "),
        ({"subsets": {"s": [900]}}, "sample id 900 is not in the run"),
        ({"subsets": {}}, "subset"),
        ({"subsets": {"s": [1]}, "groups": "label"}, "give subsets or groups, not both"),
        ({"groups": "source"}, "unknown group column 'source'; the sample table has label, true_label, planted"),
        ({"level": 1.5}, "level is 1.5"),
        ({"alternative": "less"}, "alternative is 'less'"),
        ({"correction": "bonferroni"}, "correction is 'bonferroni'"),
        ({"budget": "time"}, "budget is 'time'"),
        ({"query": "self"}, "no self-influence"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_questions_that_cannot_be_answered(run: fi.Run, arguments: dict[str, Any], message: str) -> None:
    question: dict[str, Any] = {"query": "validation"} | arguments
    with pytest.raises(InputError, match=message) as caught:
        run.influence(**question)
    assert "\n" not in str(caught.value)


def test_pooling_runs(tmp_path: Path) -> None:
    # Means in the unit of the root mean square of the runs' noise.
    runs = [record(tmp_path / str(seed), seed=seed, self_influence="record") for seed in range(3)]
    table = fi.pool(runs, "first")
    frames = [run.influence("first") for run in runs]
    sigma = np.array([frame.finfluence.meta["sigma"] for frame in frames])[:, None]  # pyright: ignore[reportAttributeAccessIssue]
    units = sigma / np.sqrt((sigma**2).mean())
    mus = np.array([frame["mu"].to_numpy() for frame in frames]) * units
    errors = np.array([frame["se"].to_numpy() for frame in frames]) * units
    np.testing.assert_allclose(table["mu"].to_numpy(), mus.mean(0))
    variance = np.maximum(mus.var(0, ddof=1), (errors**2).mean(0))
    np.testing.assert_allclose(table["se"].to_numpy(), np.sqrt(variance / 3))
    assert fi.pool(runs, "first", subsets={"s": [1, 2]})["size"].to_list() == [2]
    assert fi.pool(runs, "self")["mu"].is_finite().all()
    with pytest.raises(InputError, match="pooling needs at least two runs, got 1"):
        fi.pool(runs[:1], "first")
    with pytest.raises(InputError, match="unknown query"):
        fi.pool(runs, "third")


def test_directories_that_are_no_readable_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent does not exist"):
        fi.open_run(tmp_path / "absent")
    with pytest.raises(StoreError, match="is not a run directory"):
        fi.open_run(Path(__file__).parent)
    record(tmp_path / "run")
    part = next((tmp_path / "run/signals").glob("*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(StoreError, match="is not a readable Parquet file"):
        fi.open_run(tmp_path / "run")
    part.write_bytes(whole)
    shutil.copy(part, tmp_path / "run/panel/part-x.parquet")
    with pytest.raises(StoreError, match="the file belongs to another run, remove it"):
        fi.open_run(tmp_path / "run")


def test_a_run_that_is_being_written_and_one_that_was_interrupted(tmp_path: Path) -> None:
    record(tmp_path / "run")
    path = tmp_path / "run/run.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "pid_started"} | {"status": "running"}))
    with pytest.raises(StoreError, match=f"still being written by process {os.getpid()}.*partial=True"):
        fi.open_run(tmp_path / "run")
    assert "running" in repr(fi.open_run(tmp_path / "run", partial=True))
    path.write_text(json.dumps(manifest | {"status": "running", "pid_started": 1.0}))
    with pytest.warns(FinfluenceWarning, match="was interrupted"):
        interrupted = fi.open_run(tmp_path / "run")
    assert interrupted.influence("first").height == N


def test_the_whole_epochs_of_an_interrupted_run_give_its_noise(tmp_path: Path) -> None:
    # cut in its third epoch, its noise is that of the first two
    from finfluence.signals import SignalWriter

    record(tmp_path / "run", panel=fi.NoisePanel(samples=N, positions=100))
    with SignalWriter.resume(tmp_path / "run") as writer:
        writer.truncate_from(15)
        writer.close("failed")
    cut = fi.open_run(tmp_path / "run")
    two = record(tmp_path / "two", panel=fi.NoisePanel(samples=N, positions=100), epochs=2)
    sigma = [run.influence("first").finfluence.meta["sigma"] for run in (cut, two)]  # pyright: ignore[reportAttributeAccessIssue]
    assert sigma[0] == pytest.approx(sigma[1])
    assert cut.influence("first")["mu"].is_finite().all()


def test_a_sample_table_that_lacks_a_recorded_sample(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    run.samples().head(N - 1).write_parquet(tmp_path / "run/samples.parquet")
    with pytest.raises(StoreError, match=r"signals of sample 41, which samples.parquet lacks"):
        fi.open_run(tmp_path / "run").influence("first")


def test_a_run_on_an_fsspec_file_system() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    try:
        run = record("memory://runs/a", sensitivity="both", self_influence="record")  # pyright: ignore[reportArgumentType]
        assert run.influence("first")["mu"].is_finite().all()
        assert isinstance(run.influence("self"), pl.DataFrame)
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
