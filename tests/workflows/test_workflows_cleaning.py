"""`clean` and the removal curve: what is chosen, what is promised, and what the files look like afterwards."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError
from finfluence.tradeoff import g_mu
from finfluence.workflows import clean, removal_curve
from finfluence.workflows.removal import SURE, Selection, large_groups_note, measured_points
from finfluence.workflows.sources import Source

ROWS = 120
WRONG = 12


def make_rows() -> list[dict[str, object]]:
    """Rows of which the first twelve have the wrong label; texts that need care in every format."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for i in range(ROWS):
        x = generator.normal(size=2)
        label = int(x[0] > 0) if i >= WRONG else int(x[0] <= 0)
        text = ["plain", 'say "hi", twice', "two\nlines", "größer ≥ 1"][i % 4]
        rows.append({"id": f"r{i}", "text": text, "x0": float(x[0]), "x1": float(x[1]), "label": label})
    return rows


def write(rows: list[dict[str, object]], path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pl.DataFrame(rows).write_parquet(path)
    return path


def record(directory: Path, **options: object) -> fi.Run:
    rows = make_rows()
    torch.manual_seed(0)
    x = torch.tensor([[row["x0"], row["x1"]] for row in rows], dtype=torch.float32)
    held = torch.randn(400, 2)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return fi.train(
        fi.ClassificationTask(),
        model,
        TensorDataset(x, torch.tensor([row["label"] for row in rows])),
        queries={"validation": (held, (held[:, 0] > 0).long())},
        optimizer=fi.SGD(lr=0.5),
        epochs=5,
        batch_size=10,
        directory=directory,
        show_progress="never",
        **({"sensitivity": "replay"} | options),  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cleaning")


@pytest.fixture(scope="module")
def run(folder: Path) -> fi.Run:
    source = write(make_rows(), folder / "data.jsonl")
    samples = pl.DataFrame(
        {
            "sample": [f"r{i}" for i in range(ROWS)],
            "origin": [None if i % 10 == 9 else "bad" if i < WRONG else f"good-{i % 3}" for i in range(ROWS)],
        }
    )
    return record(folder / "run", source=Source.of(source, id_column="id").as_dict(), samples=samples)


def test_the_wrong_labels_are_dropped_and_the_promise_says_so(run: fi.Run) -> None:
    cleaning = clean(run, "validation")
    dropped = set(cleaning.dropped["sample"])
    assert len(dropped & {f"r{i}" for i in range(WRONG)}) >= 10
    assert cleaning.dropped["mu"].is_sorted()
    assert (cleaning.dropped["q_value"] <= 0.05).all()
    assert sorted([*cleaning.kept, *dropped]) == sorted(run.samples()["sample"])
    assert cleaning.predicted is not None
    assert cleaning.predicted.interval(0.95)[1] < 0
    text = str(cleaning)
    assert f"Retraining without these {len(dropped)} rows lowers the measured loss of 'validation'" in text
    assert "with probability > 0.99" in text
    assert "large" in text  # more than 5 % of the data
    assert "μ" in cleaning._repr_html_()
    # the façade is the same
    assert run.clean("validation").dropped.equals(cleaning.dropped)


def test_live_signals_promise_no_size(folder: Path) -> None:
    live = record(folder / "live", sensitivity="live")
    for result in (clean(live, "validation", top=3), removal_curve(live, "validation", points=3)):
        assert "live signals, which rank rows but are not calibrated" in str(result)


def test_the_promise_is_less_extreme_than_the_chosen_estimates(run: fi.Run) -> None:
    cleaning = clean(run, "validation", top=5)
    naive = run.influence("validation", subsets={"cut": cleaning.dropped["sample"]})
    assert cleaning.predicted is not None
    assert 0 > cleaning.predicted.mu > naive["mu"][0]
    assert "one of the strongest 5" in cleaning.dropped["reason"][0]


def test_rules_choose_what_they_say(run: fi.Run) -> None:
    frame = run.influence("validation", alternative="harmful", correction="by")
    assert set(clean(run, "validation", fdr=0.01, correction="by").dropped["sample"]) == set(
        frame.filter(pl.col("q_value") <= 0.01)["sample"]
    )
    alpha, beta = 0.05, 0.9
    chosen = clean(run, "validation", budget=(alpha, beta)).dropped["sample"]
    bound = (-(frame["mu"] + 1.6448536 * frame["se"])).to_numpy()
    expected = [
        name
        for name, mu in zip(frame["sample"], bound, strict=True)
        if mu > 0 and g_mu(alpha, float(mu)) <= beta  # the definition, with the one-sided bound
    ]
    assert sorted(chosen) == sorted(expected)
    assert len(expected) > 2
    supporting = clean(run, "validation", effect="supporting", top=3)
    assert (supporting.dropped["mu"] > 0).all()
    assert "raises" in str(supporting)
    assert clean(run, "validation", top="recommended").dropped.height == removal_curve(run, "validation").recommended


def test_the_strongest_by_relative_influence(folder: Path) -> None:
    run = record(folder / "relative", self_influence="all")
    frame = run.influence("validation", alternative="harmful", relative=True)
    cleaning = clean(run, "validation", top=6, relative=True)
    assert cleaning.dropped["sample"].to_list() == frame.sort("relative")["sample"][:6].to_list()
    assert set(cleaning.dropped["sample"]) != set(frame.sort("mu")["sample"][:6])
    assert "by relative influence, significant or not" in str(cleaning)
    assert "one of the strongest 6 by relative influence" in cleaning.dropped["reason"][0]
    words = ("score", str(run.directory), "--relative", "--effect", "supporting", "--top", "1")
    code = "from finfluence.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert "relative to the gradient's length, most supporting first" in shown
    assert "relative μ" in shown
    assert str(frame.sort("relative")["sample"][-1]) in shown


def test_whole_groups_are_dropped_and_rows_without_a_group_stay(run: fi.Run) -> None:
    cleaning = clean(run, "validation", group="origin")
    table = run.samples()
    assert cleaning.dropped["group"].unique().to_list() == ["bad"]
    assert set(cleaning.dropped["sample"]) == set(table.filter(pl.col("origin") == "bad")["sample"])
    assert "12 rows have no 'origin' and stay" in str(cleaning)
    assert set(table.filter(pl.col("origin").is_null())["sample"]) <= set(cleaning.kept)
    assert cleaning.predicted is not None
    group = run.influence("validation", groups="origin").filter(pl.col("group") == "bad")
    assert cleaning.dropped["mu"][0] == group["mu"][0]
    assert abs(cleaning.predicted.mu - group["mu"][0]) < 2 * group["se"][0]
    # a tenth of the rows of one kind: no probability, but what a sum of single rows cannot say
    assert "More than 5 % of the data: bad. There" in str(cleaning)
    assert "with probability" not in str(cleaning)


def test_groups_too_large_for_a_derivative_are_named() -> None:
    frame = pl.DataFrame({"group": ["a", "b", "c"], "size": [4, 5, 30]})
    assert large_groups_note(frame.head(1), 100) is None
    assert large_groups_note(frame.head(2), 100) is None
    assert str(large_groups_note(frame, 100)).startswith("More than 5 % of the data: c. There")
    many = pl.DataFrame({"subset": [f"s{k}" for k in range(9)], "size": [10] * 9})
    assert "of the data each: s0, s1, s2, s3, s4, s5 and 3 more. There" in str(large_groups_note(many, 100))


def test_nothing_significant_says_what_else_to_try_and_writes_nothing(run: fi.Run, tmp_path: Path) -> None:
    cleaning = clean(run, "validation", fdr=1e-300)
    assert cleaning.predicted is None
    assert cleaning.write(tmp_path / "none.jsonl") == ()
    assert list(tmp_path.iterdir()) == []
    for word in ("Nothing to drop", "pool several runs", "--group", 'signals="full"'):
        assert word in str(cleaning)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_kept_rows_stand_as_they_stood_and_dropped_ones_have_their_figures(
    run: fi.Run, tmp_path: Path, suffix: str
) -> None:
    # one content hash whatever the format, so the run of the JSON lines can cut its copies
    data = write(make_rows(), tmp_path / f"copy.{suffix}")
    cleaning = clean(run, "validation", top=7, data=data)
    path, sibling = cleaning.write(tmp_path / f"out.{suffix}")
    assert sibling.name == f"out.dropped.{suffix}"
    gone = {int(name[1:]) for name in cleaning.dropped["sample"]}
    rest = [i for i in range(ROWS) if i not in gone]
    if suffix == "parquet":
        assert pq.read_table(path).equals(pq.read_table(data).take(rest))
        records = pq.read_table(sibling).to_pylist()
    elif suffix == "jsonl":
        lines = data.read_bytes().splitlines(keepends=True)
        assert path.read_bytes() == b"".join(lines[i] for i in rest)
        records = [json.loads(line) for line in sibling.read_text(encoding="utf-8").splitlines()]
    else:
        kept = path.read_bytes()
        assert kept.splitlines()[0] == data.read_bytes().splitlines()[0]
        with path.open(newline="", encoding="utf-8") as file:
            assert [row["id"] for row in csv.DictReader(file)] == [f"r{i}" for i in rest]
        assert b'"two\nlines"' in kept
        with sibling.open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
    assert [row["sample"] for row in records] == cleaning.dropped["sample"].to_list()
    assert [row["text"] for row in records] == [make_rows()[int(row["sample"][1:])]["text"] for row in records]
    assert [float(row["mu"]) for row in records] == pytest.approx(cleaning.dropped["mu"].to_list())
    assert {"ci_low", "ci_high", "q_value", "reason"} <= set(records[0])


def test_nothing_is_ever_overwritten(run: fi.Run, folder: Path, tmp_path: Path) -> None:
    cleaning = clean(run, "validation", top=3)
    before = (folder / "data.jsonl").read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        cleaning.write(folder / "data.jsonl")
    assert (folder / "data.jsonl").read_bytes() == before
    (tmp_path / "out.dropped.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"out\.dropped\.jsonl exists"):
        cleaning.write(tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["out.dropped.jsonl"]
    with pytest.raises(InputError, match=r"name the output \*\.jsonl"):
        cleaning.write(tmp_path / "out.csv")
    with pytest.raises(InputError, match="does not exist"):
        cleaning.write(tmp_path / "nowhere" / "out.jsonl")


def test_changed_missing_and_foreign_rows_are_counted_and_named(run: fi.Run, tmp_path: Path) -> None:
    def refused(rows: list[dict[str, object]], message: str, **options: str) -> None:
        data = write(rows, tmp_path / "data.jsonl")
        with pytest.raises(InputError, match=message):
            clean(run, "validation", top=3, data=data, **options).write(tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()

    rows = make_rows()
    changed = [{**row, "text": "edited"} if i in (40, 41) else row for i, row in enumerate(rows)]
    refused(changed, r"2 of 120 rows of .* changed since the run, the first is the one of sample 'r40'")
    refused(rows[:100], r"20 of the run's 120 samples match no row .* the first is 'r100'")
    refused([*rows, rows[5]], "holds the id 'r5' in more than one row")
    refused(
        rows, r"120 of the run's 120 samples match no row .*\(by column 'text'\)|more than one row", id_column="text"
    )
    with pytest.raises(InputError, match="is not here"):
        clean(run, "validation", top=3, data=tmp_path / "gone.jsonl").write(tmp_path / "out.jsonl")


def test_rows_that_the_run_never_saw_are_kept(run: fi.Run, tmp_path: Path) -> None:
    rows = make_rows()
    extra = {**rows[0], "id": "new"}
    data = write([extra, *reversed(rows)], tmp_path / "data.jsonl")
    path, _ = clean(run, "validation", top=3, data=data).write(tmp_path / "out.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["id"] == "new"
    assert len(lines) == ROWS + 1 - 3


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "tsv"])
def test_a_run_without_a_file_gives_its_sample_table(folder: Path, tmp_path: Path, suffix: str) -> None:
    bare = fi.open_run(folder / "bare") if (folder / "bare").exists() else record(folder / "bare")
    cleaning = clean(bare, "validation", top=4)
    path, sibling = cleaning.write(tmp_path / f"out.{suffix}")
    readers = {"jsonl": pl.read_ndjson, "parquet": pl.read_parquet, "csv": pl.read_csv}
    frames = [pl.read_csv(p, separator="\t") if suffix == "tsv" else readers[suffix](p) for p in (path, sibling)]
    assert frames[0]["sample"].to_list() == cleaning.kept.to_list()
    assert frames[1]["sample"].to_list() == cleaning.dropped["sample"].to_list()
    assert "content_hash" not in frames[0].columns
    # a file by position alone can be cut, but not checked: its rows are not the tensors that were hashed
    data = write(make_rows(), tmp_path / "data.jsonl")
    with pytest.warns(FinfluenceWarning, match="would not be noticed"):
        path, _ = clean(bare, "validation", top=4, data=data).write(tmp_path / "by-position.jsonl")
    assert len(path.read_text().splitlines()) == ROWS - 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fdr": 1.5}, "must lie in"),
        ({"top": 0}, "at least 1"),
        ({"top": ROWS}, "leave some"),
        ({"top": "most"}, "recommended"),
        ({"fdr": 0.1, "top": 3}, "one rule"),
        ({"budget": (0.5, 0.6)}, "tossing a coin"),
        ({"effect": "bad"}, "harmful or supporting"),
        ({"correction": "bonferroni"}, "bh or by"),
        ({"group": "nope"}, "unknown group column 'nope'; the sample table has origin"),
        ({"group": "origin", "top": "recommended"}, "single rows"),
        ({"relative": True}, "give a number of rows"),
        ({"relative": True, "top": "recommended"}, "give a number of rows"),
        ({"relative": True, "top": 3, "group": "origin"}, "single rows"),
        ({"relative": True, "top": 3}, "has no self-influence"),
    ],
)
def test_bad_rules_say_what_to_do(run: fi.Run, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clean(run, "validation", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="nope"):
        clean(run, "nope")


def test_the_curve_falls_while_rows_are_harmful_and_its_recommendation_is_sure(run: fi.Run) -> None:
    curve = removal_curve(run, "validation", points=20)
    frame = curve.frame
    assert frame.columns == ["k", "share", "mu", "se", "ci_low", "ci_high"]
    assert frame.row(0) == (0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert frame["k"].is_sorted()
    assert frame["k"].max() == ROWS // 2
    assert (frame["share"] - frame["k"] / ROWS).abs().max() == 0  # pyright: ignore[reportOperatorIssue]
    assert frame["mu"][:6].is_sorted(descending=True)
    assert (frame["ci_low"] <= frame["mu"]).all()
    assert curve.recommended in frame["k"].to_list()
    selection = Selection.of(run, "validation", effect="harmful")
    cut = selection.order[: curve.recommended]
    assert selection.probability[cut].mean() == pytest.approx(curve.expected)
    assert curve.expected >= SURE
    # the last row of the cut brings at least twice what the average row does
    assert -selection.shrunk.mean[cut[-1]] > 2 * np.abs(selection.shrunk.mean).mean()
    # twelve labels are wrong, two of them on rows near the border, which hardly matter
    assert 8 <= curve.recommended <= 14
    assert curve.measured.is_empty()
    assert curve.measured.columns == ["k", "mu", "se", "ci_low", "ci_high"]
    assert f"remove the {curve.recommended} rows" in str(curve)
    assert "<table" in curve._repr_html_()
    up = removal_curve(run, "validation", effect="supporting", points=5)
    assert up.frame["mu"][1] > 0
    with pytest.raises(InputError, match="at least 2 points"):
        removal_curve(run, "validation", points=1)


def test_measured_points_are_those_of_the_asked_query_and_side(run: fi.Run) -> None:
    measured = {"mu": -1.0, "se": 0.1, "ci_low": -1.2, "ci_high": -0.8}
    entries = [
        {"query": "validation", "k": 5, "effect": "harmful", "measured": measured},
        {"query": "validation", "k": None, "effect": "harmful", "measured": measured},
        {"query": "validation", "k": 7, "effect": "supporting", "measured": measured},
        {"query": "other", "k": 9, "effect": "harmful", "measured": measured},
    ]
    path = Path(run.directory) / "verified.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    try:
        assert measured_points(run, "validation", effect="harmful")["k"].to_list() == [5]
        path.write_text("{broken", encoding="utf-8")
        with pytest.raises(InputError, match=r"verified\.json cannot be read"):
            removal_curve(run, "validation")
    finally:
        path.unlink()
