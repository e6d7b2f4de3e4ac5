"""Comparing runs: the figures against the frames they come from, and the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import typer
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import finfluence as fi
from finfluence.cli.compare_runs import compare_runs as command
from finfluence.errors import FinfluenceWarning, InputError
from finfluence.workflows.comparison import compare_runs
from finfluence.workflows.digits import digits


def record(directory: Path, *, seed: int, samples: int = 150, queries: str = "validation") -> fi.Run:
    recipe = digits(samples=samples, epochs=4)
    return recipe.train(
        directory,
        start=0,
        queries={queries: recipe.queries["validation"]},
        batch_size=15,
        seed=seed,
        sensitivity="both",
        self_influence="record",
        show_progress="never",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[fi.Run]:
    folder = tmp_path_factory.mktemp("compare")
    return [record(folder / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]


def test_figures_equal_those_worked_out_from_the_frames(runs: list[fi.Run]) -> None:
    found = compare_runs(runs, known="planted", top=(0.1,), fdr=0.2)
    frames = [run.influence("validation", alternative="harmful") for run in runs]
    tops = [set(frame.sort("mu").head(15)["sample"]) for frame in frames]
    jaccard = [len(a & b) / len(a | b) for a, b in ((tops[0], tops[1]), (tops[0], tops[2]), (tops[1], tops[2]))]
    figure = found.figure("Jaccard", "top 10 %")
    assert figure.value == pytest.approx(np.mean(jaccard))
    assert figure.low < figure.value < figure.high
    flags = [set(frame.filter((pl.col("q_value") <= 0.2) & (pl.col("mu") < 0))["sample"]) for frame in frames]
    planted = set(runs[0].samples().filter("planted")["sample"])
    everyone = set.intersection(*flags)
    assert set(found.agreed) == everyone
    assert found.figure("joint recall", "flagged").value == pytest.approx(len(planted & everyone) / len(planted))
    mean = np.mean([frame["mu"].to_numpy() for frame in frames], axis=0)
    by_id = found.samples.sort("sample")
    assert by_id["mean_mu"].to_numpy() == pytest.approx(mean)
    assert found.pairs.filter(set="all")["spearman"].is_between(-1, 1).all()
    assert fi.SIGN_CONVENTION in str(found)
    with pytest.raises(InputError, match="no 'nothing'"):
        found.figure("nothing", "all")


def test_self_influence_looks_at_the_other_end(runs: list[fi.Run]) -> None:
    found = compare_runs(runs, "self", top=(0.1,), known="planted")
    assert found.effect == "supporting"
    tops = [set(run.influence("self").sort("mu", descending=True).head(15)["sample"]) for run in runs]
    planted = set(runs[0].samples().filter("planted")["sample"])
    expected = np.mean([len(top & planted) / len(planted) for top in tops])
    assert found.figure("recall", "top 10 %").value == pytest.approx(expected)


def test_bad_input_says_what_is_wrong(runs: list[fi.Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two or more runs"):
        compare_runs(runs[:1])
    with pytest.raises(InputError, match="given twice"):
        compare_runs([runs[0], runs[0].directory])
    with pytest.raises(InputError, match="nope"):
        compare_runs(runs, "nope")
    with pytest.raises(InputError, match="unknown column 'nope'"):
        compare_runs(runs, known="nope")
    with pytest.raises(InputError, match="true and false"):
        compare_runs(runs, known="label")
    with pytest.raises(InputError, match="unknown effect"):
        compare_runs(runs, effect="bad")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="between 0 and 1"):
        compare_runs(runs, fdr=2.0)
    other = record(tmp_path / "fewer", seed=1, samples=120)
    with pytest.raises(InputError, match="other samples"):
        compare_runs([runs[0], other])
    renamed = record(tmp_path / "renamed", seed=1, queries="other")
    with pytest.raises(InputError, match="share the queries none"):
        compare_runs([runs[0], renamed])


def test_the_same_training_twice_is_not_taken_for_consistency(runs: list[fi.Run], tmp_path: Path) -> None:
    again = record(tmp_path / "again", seed=1)
    with pytest.warns(FinfluenceWarning, match="one training under two names"):
        compare_runs([runs[0], runs[1], again])


def test_changed_contents_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    found = []
    for seed, marks in ((1, ["a"] * 20), (2, ["a"] * 19 + ["b"])):
        table = pl.DataFrame({"sample": range(20), "content_hash": marks})
        torch.manual_seed(0)
        found.append(
            fi.train(
                fi.ClassificationTask(),
                torch.nn.Linear(3, 2),
                TensorDataset(x, y),
                queries={"q": (x, y)},
                optimizer=fi.SGD(lr=0.1),
                epochs=2,
                batch_size=5,
                seed=seed,
                samples=table,
                directory=tmp_path / str(seed),
                show_progress="never",
            )
        )
    with pytest.raises(InputError, match=r"1 samples of .* other contents"):
        compare_runs(found)


def test_the_command_prints_the_same_figures(runs: list[fi.Run]) -> None:
    app = typer.Typer()
    app.command()(command)
    words = [*(str(run.directory) for run in runs), "--known", "planted", "--top", "5%,10"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert fi.SIGN_CONVENTION in table.output
    assert "joint recall" in table.output
    frame = pl.read_csv(CliRunner().invoke(app, [*words, "--format", "csv"]).stdout.encode())
    expected = compare_runs(runs, known="planted", top=(0.05, 0.1)).frame
    assert frame["value"].to_list() == pytest.approx(expected["value"].to_list(), nan_ok=True)
    for bad in ("x", "0", "101"):
        assert isinstance(CliRunner().invoke(app, [*words[:3], "--top", bad]).exception, InputError)


def test_comparing_needs_no_torch(runs: list[fi.Run]) -> None:
    code = (
        "import sys\n"
        "from finfluence.workflows.comparison import compare_runs\n"
        f"print(compare_runs({[str(run.directory) for run in runs]!r}).frame.height)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
