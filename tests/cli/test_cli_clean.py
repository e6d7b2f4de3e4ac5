"""`finfluence clean` and `finfluence verify --curve` as a tired user meets them: files, words, bad input."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import finfluence as fi
from finfluence.cli.clean import clean
from finfluence.cli.main import app, main, register
from finfluence.workflows.digits import digits
from finfluence.workflows.removal import verified
from finfluence.workflows.sources import Source


@pytest.fixture(scope="module", autouse=True)
def commands() -> None:
    register()
    if not any(command.callback is clean for command in app.registered_commands):
        app.command()(clean)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 200 digits whose labels came from a JSON-lines file."""
    folder = tmp_path_factory.mktemp("clean")
    recipe = digits(samples=200, epochs=4, seed=3)
    assert recipe.samples is not None
    data = folder / "digits.jsonl"
    rows = recipe.samples.select("sample", "label").with_columns(pl.lit('a "digit"').alias("text"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows.iter_rows(named=True)), encoding="utf-8")
    source = Source.of(data, id_column="sample").as_dict()
    recipe.train(folder / "run", sensitivity="replay", source=source, show_progress="never")
    return folder / "run"


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(words))
    out, err = capsys.readouterr()
    code = done.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), out, err


def test_the_cleaned_file_and_what_it_is_predicted_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cleaned.jsonl"
    words = ("clean", str(run), "--query", "validation", "--effect", "harmful", "--fdr", "0.05", "-o", str(output))
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert fi.SIGN_CONVENTION in out
    assert "predicted influence of the cut as a whole: μ = -" in out
    assert "lowers the measured loss of 'validation' with probability" in out
    original = (run.parent / "digits.jsonl").read_bytes().splitlines(keepends=True)
    kept = output.read_bytes().splitlines(keepends=True)
    dropped = [json.loads(line) for line in (tmp_path / "cleaned.dropped.jsonl").read_text().splitlines()]
    gone = {row["sample"] for row in dropped}
    assert kept == [line for i, line in enumerate(original) if i not in gone]
    assert str(len(kept)) in out
    # the file's own column of that name stays, the figures stand beside it
    assert all(row["finfluence_sample"] == row["sample"] for row in dropped)
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "exists and is not overwritten" in err


def test_several_runs_are_cut_and_scored_as_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = digits(samples=200, epochs=4, seed=3)
    source = fi.open_run(run).manifest["source"]
    other = recipe.train(tmp_path / "other", sensitivity="replay", seed=8, source=source, show_progress="never")
    pair = (str(run), other.directory)
    pooled = fi.pool([fi.open_run(place) for place in pair], "validation").sort("mu")
    output = tmp_path / "cleaned.jsonl"
    code, out, err = call(capsys, "clean", *pair, "--top", "6", "-o", str(output))
    assert code == 0, err
    dropped = [json.loads(line) for line in (tmp_path / "cleaned.dropped.jsonl").read_text().splitlines()]
    assert [row["finfluence_sample"] for row in dropped] == pooled["sample"][:6].to_list()
    assert "predicted influence of the cut as a whole: μ = -" in out
    code, out, err = call(capsys, "score", *pair, "--format", "csv")
    assert code == 0, err
    np.testing.assert_allclose(pl.read_csv(out.encode()).sort("mu")["mu"], pooled["mu"], rtol=1e-9)
    code, out, _ = call(capsys, "score", *pair, "--top", "1")
    assert (code, "2 runs averaged" in out) == (0, True)
    code, out, err = call(capsys, "verify", *pair, "--curve", "6", "--runs", "4")
    assert code == 0, err
    cut = fi.open_runs(pair).clean("validation", top=6)
    assert cut.predicted is not None
    assert f"predicted from 2 recorded runs       μ = {cut.predicted.mu:+.2f}" in out
    kept = json.loads((run / "verified.json").read_text(encoding="utf-8"))
    assert [(entry["k"], entry["predicted"]["mu"]) for entry in kept] == [(6, cut.predicted.mu)]
    assert kept[0]["recordings"] == [Path(name).name for name in pair]  # it is no prediction of the first run alone
    assert verified(fi.open_run(pair[0])) == []
    (run / "verified.json").unlink()
    for words, message in (
        (("score", *pair, "--estimator", "max"), "averaged with the gaussian estimator"),
        (("score", *pair, "--query", "nope"), "unknown query 'nope'"),
        (("clean", str(run), str(run), "-o", str(tmp_path / "x.jsonl")), "given twice"),
    ):
        code, _, err = call(capsys, *words)
        assert code == 2
        assert message in err


def test_nothing_significant_is_no_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "clean", str(run), "--fdr", "1e-300", "-o", str(tmp_path / "cleaned.jsonl"))
    assert code == 0
    assert "Nothing to drop" in out
    assert "Nothing was written" in out
    assert "pool" in out
    assert list(tmp_path.iterdir()) == []


def test_changed_rows_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run.parent / "digits.jsonl").read_text(encoding="utf-8").splitlines()
    lines[7] = lines[7].replace("digit", "DIGIT")
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, _, err = call(capsys, "clean", str(run), "--top", "5", "--data", str(copy), "-o", str(tmp_path / "o.jsonl"))
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error:")] == [err.strip()]
    assert "1 of 200 rows" in err
    assert "'7'" in err


def test_points_of_the_curve_are_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "verify", str(run), "--curve", "4, recommended", "--runs", "4")
    assert code == 0, err
    assert "predicted from the recorded run and measured by 4 pairs of retrainings" in out
    assert next(line.split()[:3] for line in out.splitlines() if "most harmful" in line) == ["4", "most", "harmful"]
    assert "of 2 predictions agree with retraining" in out
    assert "2 subsets, 4 pairs of retrainings each: the widest 95 % interval is" in err
    measured = fi.open_run(run)
    from finfluence.workflows import removal_curve

    curve = removal_curve(measured, "validation")
    assert set(curve.measured["k"]) == {4, curve.recommended}


BAD = [
    (["clean", "{run}", "-o", "{out}.jsonl", "--top", "many"], "many"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--top", "5", "--fdr", "0.1"], "fdr and top"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--budget-type-1", "0.1"], "--budget-type-2"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--effect", "bad"], "bad"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--correction", "none"], "none"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--group", "nope"], "nope"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--query", "nope"], "nope"),
    (["clean", "{run}", "-o", "{out}.csv"], ".csv"),
    (["clean", "{run}", "-o", "{out}"], "no suffix"),
    (["clean", "{run}", "-o", "{data}"], "never overwritten"),
    (["clean", "{run}", "-o", "{out}.jsonl", "--data", "gone.jsonl"], "gone.jsonl"),
    (["verify", "{run}", "--curve", "3,x"], "'x'"),
    (["verify", "{run}", "--curve", "500"], "500"),
    (["verify", "{run}", "--curve", "3", "--flagged"], "one of them"),
]


def test_every_group_of_a_column_is_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "verify", str(run), "--group", "label", "--runs", "4")
    assert code == 0, err
    opened = fi.open_run(run)
    labels = sorted(opened.samples()["label"].unique().to_list())
    assert [line.split()[1] for line in out.splitlines() if line.startswith("label ")] == [str(c) for c in labels]
    states = opened.verify_groups("label", runs=4, progress=False)
    assert [state.name for state in states] == [f"label {c}" for c in labels]
    assert [s.predicted.mu for s in states] == opened.influence("validation", groups="label")["mu"].to_list()
    for state, label in zip(states, labels, strict=True):
        alone = opened.verify(opened.samples().filter(pl.col("label") == label)["sample"], runs=4, progress=False)
        assert (alone.measured.mu, alone.means) == (state.measured.mu, state.means)  # the same retrainings
        assert f"{state.measured.mu:+.3g}" in out
    code, _, err = call(capsys, "verify", str(run), "--group", "nope", "--runs", "4")
    assert code == 2
    assert "unknown group column 'nope'" in err
    (run / "verified.json").unlink()


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    places = {"run": run, "out": tmp_path / "out", "data": run.parent / "digits.jsonl"}
    code, _, err = call(capsys, *(word.format(**places) for word in words))
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "clean", "--help")
    assert code == 0
    assert "Example: finfluence clean" in " ".join(out.split())


def test_null_groups_are_listed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = fi.open_run(run).samples()
    path = run / "samples.parquet"
    before = path.read_bytes()
    origin = np.where(table["planted"].to_numpy(), "web", np.where(np.arange(200) % 5 == 0, "", "books")).tolist()
    table.with_columns(pl.Series("origin", [name or None for name in origin])).write_parquet(path)
    try:
        scored = call(capsys, "score", str(run), "--group", "origin")
        code, out, err = call(capsys, "clean", str(run), "--group", "origin", "-o", str(tmp_path / "cleaned.jsonl"))
    finally:
        path.write_bytes(before)
    assert code == 0, err
    assert "1 group by 'origin': web" in out
    assert f"{origin.count('')} samples have no 'origin'" in scored[2]
    assert f"{origin.count('')} rows have no 'origin' and stay" in out
