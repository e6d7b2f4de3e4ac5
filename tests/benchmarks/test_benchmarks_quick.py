"""Every benchmark runs in its quick version and writes a record from which the page can be made.

Quick figures mean nothing; what is tested is that each command works, says what it ran, and keeps its places private.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.__main__ import NAMES  # noqa: E402
from benchmarks._records import Record, command, markdown, parser  # noqa: E402

from benchmarks import _results  # noqa: E402

# words beside --quick: one setting where a benchmark has many
QUICK = {"calibration": ["--settings", "tanh-sgd"]}
# measured by their own tests, with the models and data that they need
ELSEWHERE = {"poison", "poison_truth", "smollm2_overhead", "llama8b_overhead"}


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set the number of threads for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_the_quick_version_runs_and_writes_its_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # some measure in processes of their own, `python -m benchmarks.NAME`
    record = tmp_path / f"{name}.json"
    words = ["--quick", *QUICK.get(name, []), "--output", str(record)]
    monkeypatch.setattr(sys, "argv", [f"benchmarks {name}", *words])
    importlib.import_module(f"benchmarks.{name}").main(words)
    made = json.loads(record.read_text(encoding="utf-8"))
    page = _results.page(tmp_path)
    assert f"## {name}" in page
    assert str(tmp_path) not in record.read_text(encoding="utf-8") + page
    rows = made.get("rows") or [row for table in made["tables"] for row in table["rows"]]
    assert rows
    if "tables" in made:
        assert made["quick"] is True
        assert made["command"].startswith(f"python -m benchmarks {name} --quick")
        assert {"torch", "finfluence", "numpy"} <= set(made["versions"])


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_the_other_benchmarks_are_there(name: str) -> None:
    assert importlib.util.find_spec(f"benchmarks.{name}") is not None


def test_results_page_is_what_the_records_make() -> None:
    assert _results.PAGE.read_text(encoding="utf-8") == _results.page(), "run python -m benchmarks results"


def test_a_quick_run_leaves_the_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks._records.RESULTS", tmp_path)
    Record("arms", parser(None).parse_args(["--quick"])).table("t", {"a": "a"}, [{"a": 1}])
    assert not list(tmp_path.iterdir())
    Record("arms", parser(None).parse_args([])).table("t", {"a": "a"}, [{"a": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["arms.json"]


def test_a_record_keeps_tables_that_a_partial_run_does_not_make(tmp_path: Path) -> None:
    options = parser(None).parse_args(["--output", str(tmp_path / "x.json")])
    Record("x", options).table("first", {"a": "a"}, [{"a": 1}])
    Record("x", options, merge=True).table("second", {"a": "a"}, [{"a": 2}])
    Record("x", options, merge=True).table("first", {"a": "a"}, [{"a": 3}])
    tables = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["tables"]
    assert [(table["title"], table["rows"][0]["a"]) for table in tables] == [("first", 3), ("second", 2)]


def test_a_partial_run_keeps_the_rows_that_it_does_not_make_and_what_else_was_known(tmp_path: Path) -> None:
    options = parser(None).parse_args(["--output", str(tmp_path / "x.json")])
    first = Record("x", options)
    first.content["settings"] = {"lr": 1}
    first.content["versions"]["peer"] = "1.0"
    first.table("t", {"a": "a"}, [{"d": "one", "a": 1}, {"d": "two", "a": 2}], part="d")
    Record("x", options, merge=True).table("t", {"a": "a"}, [{"d": "two", "a": 3}], part="d")
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["tables"][0]["rows"] == [{"d": "one", "a": 1}, {"d": "two", "a": 3}]
    assert found["settings"] == {"lr": 1}
    assert found["versions"]["peer"] == "1.0"
    assert "torch" in found["versions"]


def test_markdown_shows_intervals_gaps_and_pipes() -> None:
    rows = [
        {"a": [0.5, 0.25, 0.75], "b": None, "c": "x|y"},
        {"a": [0.5, float("nan"), float("nan")], "b": 2.0, "c": True},
    ]
    lines = markdown({"title": "T", "columns": {"a": "A|.2f", "b": "B|.1f", "c": "C"}, "rows": rows}).splitlines()
    assert lines[-2:] == ["| 0.50 (0.25 to 0.75) | – | x\\|y |", "| 0.50 | 2.0 | yes |"]


def test_a_command_names_places_without_giving_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parser(None)
    made.add_argument("--data", type=Path, nargs="*", default=[])
    made.add_argument("--runs", type=int, default=5)
    words = ["--data", "/somewhere/private", "--runs", "7", "--output", "/tmp/x.json"]
    monkeypatch.setattr(sys, "argv", ["benchmarks consistency", *words])
    assert command("consistency", made.parse_args(words)) == "python -m benchmarks consistency --runs 7 --data DATA"


@pytest.mark.parametrize("kind", ["uniform", "class-conditional", "near-class", "duplicated", "shifted", "backdoor"])
def test_planted_rows_are_what_they_say(kind: str) -> None:
    from benchmarks._data import clean_problem, sources, with_noise

    clean = clean_problem("digits", sources([], samples=0)["digits"], model="mlp")
    bad = with_noise(clean, kind, 0.1, seed=3)
    (x, y), (u, v), planted = clean.train, bad.train, bad.planted
    assert 0.05 <= planted.mean() <= 0.1
    assert np.array_equal(x[~planted], u[~planted])
    assert np.array_equal(y[~planted], v[~planted])
    relabelled = y[planted] != v[planted]
    if kind in ("uniform", "class-conditional", "near-class"):
        assert relabelled.all()
        assert np.array_equal(x, u)
    if kind == "duplicated":
        rows = np.concatenate([u[planted], v[planted, None]], axis=1)
        assert len(np.unique(rows, axis=0)) == planted.sum() // 10
    if kind == "shifted":
        assert not relabelled.any()
        assert (np.abs(x[planted] - u[planted]).max(axis=1) > 0).all()
    if kind == "backdoor":
        assert (v[planted] == 0).all()
        assert bad.query is not None
        assert (bad.query[1] != 0).all()
        assert (bad.query[0].reshape(-1, 8, 8)[:, :2, :2] == 1).all()


def test_idx_files_are_read_and_others_refused(tmp_path: Path) -> None:
    import gzip

    from benchmarks._data import idx

    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    header = b"\0\0\x08" + bytes([3]) + np.array(images.shape, dtype=">i4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        b"\0\0\x08\x01" + np.array([3], dtype=">i4").tobytes() + bytes([7, 0, 9])
    )
    x, y = idx(tmp_path, "train")
    assert x == pytest.approx(images.reshape(3, 16) / 255)
    assert y.tolist() == [7, 0, 9]
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        idx(tmp_path, "t10k")
    (tmp_path / "t10k-images").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="IDX"):
        idx(tmp_path, "t10k")


def test_checkpoints_are_those_of_the_recorded_run() -> None:
    from benchmarks._data import clean_problem, sources
    from benchmarks._methods import directional, record, train
    from benchmarks.peers.common import network, sample_loss

    problem = clean_problem("digits", sources([], samples=0)["digits"], model="mlp", quick=True)
    training = train(problem, seed=4, start=2)
    assert len(training.checkpoints) == problem.epochs
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = record(problem, Path(folder) / "run", seed=4, start=2)
        assert run.influence("query").height == len(problem.planted)
    model = network(problem.network)
    model.load_state_dict(training.checkpoints[-1])
    x, y = (torch.from_numpy(part) for part in problem.train)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    dots, norms = directional(model, (x[:3], y[:3]), direction)
    for k in range(3):
        gradient = torch.autograd.grad(
            sample_loss(model, dict(model.named_parameters()), (x[k], y[k])), [*model.parameters()]
        )
        flat = torch.cat([g.flatten() for g in gradient])
        along = torch.cat([d.flatten() for d in direction.values()])
        assert dots[k] == pytest.approx(float(flat @ along), rel=1e-4)
        assert norms[k] == pytest.approx(float(flat.norm()), rel=1e-4)


def test_figures_are_drawn_from_the_records(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    from benchmarks._figures import draw

    assert draw(tmp_path, tmp_path / "none") == []
    interval = [0.5, 0.4, 0.6]
    row = {"method": "finfluence, replay", "use": "query", "randomness": "shuffling", "jaccard_10": interval}
    table = {"title": "digits, MLP: 10 samples", "columns": {"method": "method"}, "rows": [row]}
    (tmp_path / "consistency.json").write_text(json.dumps({"tables": [table]}), encoding="utf-8")
    assert draw(tmp_path, tmp_path / "drawn") == ["consistency-digits-mlp.svg"]
    svg = (tmp_path / "drawn" / "consistency-digits-mlp.svg").read_text(encoding="utf-8")
    assert "finfluence, replay" in svg
