"""The report as a file: its numbers are those of `score`, its size is bounded, awkward input is refused or escaped."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import typer
from report_runs import VERIFIED, payload_of, png, prose, synthetic_run
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import finfluence as fi
from finfluence.cli.report import report
from finfluence.errors import InputError
from finfluence.workflows.recipes import Recipe
from finfluence.workflows.report import _charts as charts
from finfluence.workflows.report import write_report
from finfluence.workflows.report._columns import sort_columns
from finfluence.workflows.report._packing import Budget, Payload, display_decimals, single, units
from finfluence.workflows.report._writing import _page

UNKNOWN, MINUS_ZERO = -(2**31), 1 - 2**31


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> fi.Run:
    samples = pl.DataFrame(
        {"sample": np.arange(200), "text": prose(200, seed=0), "source": ["web", "forum"] * 100, "grade": [0.5] * 200}
    )
    return synthetic_run(tmp_path_factory.mktemp("report") / "small", samples, queries=("a", "b"), batch=20)


def images(count: int = 40) -> Recipe:
    """A recipe whose data set holds 8 × 8 pictures; runs name it to show thumbnails."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand((count, 8, 8), generator=generator)
    labels = (pictures.mean((1, 2)) > 0.5).long()
    return Recipe(
        task=fi.ClassificationTask(),
        make_model=lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        dataset=TensorDataset(pictures, labels),
        queries={"validation": (pictures[:8], labels[:8])},
        plan=fi.Plan(optimizer=fi.SGD(lr=0.1), epochs=2, batch_size=8),
    )


# ---- numbers


def digits_of(value: float, decimals: int) -> int:
    text = f"{value:.{decimals}f}"
    number = round(float(text) * 10**decimals)
    return MINUS_ZERO if number == 0 and text.startswith("-") else number


def test_numbers_equal_those_of_score(small: fi.Run, tmp_path: Path) -> None:
    payload = payload_of(write_report(small, tmp_path / "r.html").read_text(encoding="utf-8"))
    for place, query in enumerate(("a", "b")):
        frame = small.influence(query)
        decimals = payload[f"query:{place}"]["decimals"]
        for column, name in (("ci_low", "low"), ("ci_high", "high")):
            wanted = [digits_of(value, decimals) for value in frame[column]]
            assert payload[f"{name}:{place}"].tolist() == wanted
        for column, digits in (("mu", decimals), ("q_value", 3)):
            packed = payload[f"{'mu' if column == 'mu' else 'q'}:{place}"]
            assert [f"{value:.{digits}f}" for value in packed.tolist()] == [f"{v:.{digits}f}" for v in frame[column]]
            np.testing.assert_allclose(packed, frame[column].to_numpy(), rtol=1e-6)
        groups = payload[f"query:{place}"]["groups"][0]
        by_source = small.influence(query, groups="source").sort("mu")
        assert groups["column"] == "source"
        assert [row["mu"] for row in groups["rows"]] == by_source["mu"].to_list()
        assert [row["high"] for row in groups["rows"]] == by_source["ci_high"].to_list()


def test_shares_of_visits_add_up_and_visits_sum_to_mu(small: fi.Run, tmp_path: Path) -> None:
    payload = payload_of(write_report(small, tmp_path / "r.html", query="b").read_text(encoding="utf-8"))
    assert payload["visits"].sum() == pytest.approx(1.0, rel=1e-5)
    rows, starts, values = (payload[f"visit-{name}:0"] for name in ("rows", "starts", "values"))
    mu = small.influence("b")["mu"].to_numpy()
    sums = np.array([values[a:b].sum() for a, b in itertools.pairwise(starts)])
    # μ also counts the noise of batches that are one sample smaller: half a per cent here
    np.testing.assert_allclose(sums, mu[rows], rtol=0.02, atol=1e-6)
    assert set(np.argsort(mu)[:5]) <= set(rows.tolist())


def test_displayed_digits_survive_single_precision() -> None:
    # seed 0: values close to and exactly on rounding borders, where float32 alone prints another digit
    generator = np.random.default_rng(0)
    borders = (generator.integers(-400, 400, 2000) + 0.5) / 100
    values = np.concatenate([borders + 1e-9, borders - 1e-9, generator.standard_normal(5000), borders])
    plain = values.astype(np.float32)
    assert any(f"{a:.2f}" != f"{b:.2f}" for a, b in zip(values, plain.tolist(), strict=True))
    assert [f"{a:.2f}" for a in single(values, 2).tolist()] == [f"{a:.2f}" for a in values]
    np.testing.assert_allclose(single(values, 2), values, rtol=2e-7)
    assert units(values, 2).tolist() == [digits_of(a, 2) for a in values]
    assert units([np.nan, 1.0, -0.001, 0.001], 2).tolist() == [UNKNOWN, 100, MINUS_ZERO, 0]


@pytest.mark.parametrize(("se", "decimals"), [(0.15, 2), (3.0, 2), (0.0045, 3), (0.0005, 4), (1e-12, 5)])
def test_finer_errors_show_more_decimals(se: float, decimals: int) -> None:
    assert display_decimals(pl.Series([se, None, se])) == decimals


def test_payload_round_trip() -> None:
    payload = Payload()
    payload.json("text", {"a": "ü</script>", "b": float("nan"), "c": [np.int64(3), np.float32(0.5)]})
    payload.array("odd", [1, 2, 3], "uint8")
    payload.array("wide", [-1.5, np.nan, 3e30], "float32")
    payload.raw("file", b"\x89PNG")
    encoded = payload.encode()
    assert "<" not in encoded
    read = payload_of(f'<script type="text/plain" id="payload">{encoded}</script>')
    assert read["text"] == {"a": "ü</script>", "b": None, "c": [3, 0.5]}
    assert read["odd"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(read["wide"], np.float32([-1.5, np.nan, 3e30]))
    assert read["file"] == b"\x89PNG"


# ---- what samples look like


def test_columns_find_their_use() -> None:
    n = 300
    frame = pl.DataFrame(
        {
            "sample": np.arange(n),
            "answer": [f"answer {i}" for i in range(n)],
            "text": [f"text {i}" for i in range(n)],
            "label": np.arange(n) % 7,
            "planted": [i % 2 == 0 for i in range(n)],
            "quality": np.linspace(0, 1, n),
            "content_hash": [f"{i:016x}" for i in range(n)],
            "messages": [[{"role": "user", "content": f"hello {i}"}] for i in range(n)],
            "blob": [b"no image"] * n,
            "empty": pl.Series([None] * n, dtype=pl.String),
        }
    )
    found = sort_columns(frame)
    assert found.categories == ("label", "planted")
    assert found.texts == ("text", "messages", "answer")
    assert found.numbers == ("quality",)
    assert found.images is None
    assert '"content": "hello 3"' in found.frame["messages"][3]


def test_ids_are_strings_where_the_run_has_strings(tmp_path: Path) -> None:
    names = [f"doc-{i}" for i in range(60)]
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": names}), batch=20)
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    assert payload["ids"] == names
    assert (tmp_path / "run" / "report.html").is_file()


def test_large_integer_ids_are_not_rounded(tmp_path: Path) -> None:
    ids = np.arange(60) + 2**60
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": ids}), batch=20)
    assert payload_of(write_report(run).read_text(encoding="utf-8"))["ids"] == [str(i) for i in ids]


def test_long_texts_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    texts = ["short"] * 59 + ["x y " * 25_000]
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(60), "text": texts}), batch=20)
    page = write_report(run).read_text(encoding="utf-8")
    payload = payload_of(page)
    assert payload["length"][59] == 100_000
    assert max(map(len, payload["long"]["text"])) <= 8000
    assert "the longest text has 100,000" in page


def test_columns_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = pl.DataFrame({"sample": np.arange(60)} | {f"column {i}": np.linspace(0, i + 1, 60) for i in range(5)})
    run = synthetic_run(tmp_path / "run", samples, batch=20)
    monkeypatch.setattr("finfluence.workflows.report._writing.Budget", lambda: Budget(columns=4 * 60 * 4))
    page = write_report(run).read_text(encoding="utf-8")
    assert "not in this page: column 4." in page
    assert {"number:column 0", "number:column 3"} <= set(payload_of(page))
    assert "number:column 4" not in payload_of(page)


def test_images_of_a_recipe_become_thumbnails(tmp_path: Path) -> None:
    recipe = images()
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(40)}), batch=20)
    run.manifest["recipe"] = {"function": f"{__name__}:images", "arguments": {}}
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    assert payload["thumbnails"]["shape"] == [8, 8, 1]
    first = payload["thumbnails"]["rows"][0]
    expected = np.rint(recipe.dataset.tensors[0][first].numpy() * 255).ravel()
    np.testing.assert_array_equal(payload["pixels"][:64], expected)
    # the caller's own pictures go before the recipe's
    own = np.zeros((40, 3, 100, 60), dtype=np.uint8)
    payload = payload_of(write_report(run, images=own).read_text(encoding="utf-8"))
    assert payload["thumbnails"]["shape"] == [33, 20, 3]


def test_a_recipe_that_is_gone_costs_the_thumbnails_alone(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(60)}), batch=20)
    run.manifest["recipe"] = {"function": "nowhere:nothing", "arguments": {}}
    assert payload_of(write_report(run).read_text(encoding="utf-8")).get("thumbnails") is None


def test_encoded_images_in_the_sample_table_are_shown(tmp_path: Path) -> None:
    samples = pl.DataFrame({"sample": np.arange(60), "image": [png(i) for i in range(60)]})
    run = synthetic_run(tmp_path / "run", samples, batch=20)
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    found = payload["thumbnails"]
    assert found["kind"] == "files"
    assert sorted(found["rows"]) == list(range(60))
    at, until = found["offsets"][:2]
    assert payload["files"][at:until] == png(found["rows"][0])


def test_samples_without_an_estimate_stay_in_the_table(tmp_path: Path) -> None:
    # one epoch of two batches of 25 leaves 10 of the 60 samples out
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(60)}), batch=25, epochs=1)
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    missing = run.influence("validation")["mu"].is_null().to_numpy()
    assert missing.sum() == 10
    assert np.isnan(payload["mu:0"]).tolist() == missing.tolist()
    assert ((payload["low:0"] == UNKNOWN) == missing).all()
    assert payload["query:0"]["harmful"] + payload["query:0"]["supporting"] <= 50


# ---- bad input and limits


def test_everything_is_in_the_file_and_nothing_comes_from_elsewhere(small: fi.Run, tmp_path: Path) -> None:
    page = write_report(small, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    head = page.split("<script", 1)[0]
    assert "http://" not in head
    assert "https://" not in head
    assert page.count("</script>") == 3


def test_markup_in_names_is_escaped(tmp_path: Path) -> None:
    query = '</script><script>alert("q")</script>'
    samples = pl.DataFrame({"sample": np.arange(60), "<b>source</b>": ["<i>web</i>", "'\"&"] * 30})
    run = synthetic_run(tmp_path / "run", samples, queries=(query, "other"), batch=20)
    page = write_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>source" not in page
    assert "<i>web" not in page
    assert payload_of(page)["query:0"]["name"] == query


@pytest.mark.parametrize("name", ["run.json", "samples.parquet", "report"])
def test_only_html_files_are_written(small: fi.Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.html"):
        write_report(small, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_the_first_sentence_says_what_was_measured(tmp_path: Path) -> None:
    recipe = images()
    options = fi.ReplayOptions(measure_epochs=(1, 2))
    for name, chosen, said in (
        ("end", None, "as measured on the trained model;"),
        ("mean", options, "as measured on average at 2 moments of the training;"),
    ):
        run = recipe.train(tmp_path / name, sensitivity="replay", replay_options=chosen, show_progress="never")
        assert said in write_report(run, tmp_path / f"{name}.html").read_text(encoding="utf-8")


def test_a_directory_and_an_unknown_query_are_refused(small: fi.Run, tmp_path: Path) -> None:
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(InputError, match="directory"):
        write_report(small, tmp_path / "taken.html")
    with pytest.raises(InputError, match="nope"):
        write_report(small, tmp_path / "r.html", query="nope")


def test_a_diverged_query_does_not_cost_the_others(
    small: fi.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence = fi.Run.influence

    def diverging(run: fi.Run, query: str, **options: object) -> pl.DataFrame:
        if query == "a":
            raise fi.ReplayError("the adjoint of 'a' diverged")
        return influence(run, query, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(fi.Run, "influence", diverging)
    page = write_report(small, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "the adjoint of &#39;a&#39; diverged" in page
    assert payload_of(page)["query:0"]["name"] == "b"
    with pytest.raises(InputError, match="diverged"):
        write_report(small, tmp_path / "r.html", query="a")


def test_verified_subsets_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(60)}), batch=20)
    entry = VERIFIED | {"name": "<flagged>"}
    measured = entry | {"means": [0.5312, 0.4987654]}  # files of earlier versions have no means
    target = tmp_path / "run" / "verified.json"
    target.write_text(json.dumps([entry, measured, entry | {"query": "another"}]))
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    table = payload["query:0"]["verified"]["table"]
    row = ["<flagged>", "5", "−2.00 (−2.98 to −1.02)", "−1.80 (−2.20 to −1.40)"]
    assert table == [[*row, "", "32"], [*row, "0.5312 → 0.4988", "32"]]
    assert "measured by retraining" in payload["query:0"]["removal"]["text"]
    target.write_text(json.dumps([{"query": "validation"}]))
    with pytest.raises(InputError, match=r"verified\.json"):
        write_report(run)


def test_what_retraining_measured_of_a_group_stands_beside_its_sum(tmp_path: Path) -> None:
    from finfluence.workflows.removal import ids_digest

    table = pl.DataFrame({"sample": np.arange(60), "source": ["web", "forum", "mail"] * 20})
    run = synthetic_run(tmp_path / "run", table, batch=20)
    web = np.arange(0, 60, 3)
    entry = VERIFIED | {"name": "source web", "ids_hash": ids_digest(web), "size": 20}
    (tmp_path / "run" / "verified.json").write_text(json.dumps([entry]))
    payload = payload_of(write_report(run).read_text(encoding="utf-8"))
    rows = {row["group"]: row for row in payload["query:0"]["groups"][0]["rows"]}
    assert rows["web"]["retrained"] == [entry["measured"][key] for key in ("mu", "ci_low", "ci_high")]
    assert "retrained" not in rows["forum"]
    assert rows["web"]["mu"] == run.influence("validation", groups="source").filter(group="web")["mu"][0]
    assert "retrained without" in payload["query:0"]["groupsNote"]


def test_several_queries_are_bounded_and_the_rest_is_named(tmp_path: Path) -> None:
    names = tuple(f"query-{i}" for i in range(4))
    run = synthetic_run(tmp_path / "run", pl.DataFrame({"sample": np.arange(40)}), queries=names, batch=20)
    frames = {name: run.influence(name) for name in names}
    # room for 40 samples × 2 queries
    page = _page(run, frames, [], images=None, budget=Budget(queries=2 * 40 * 10))
    assert "2 of 4 queries are in this page. Not here: query-2, query-3;" in page
    assert {"query:0", "query:1"} <= set(payload_of(page))
    assert "query:2" not in payload_of(page)


def test_a_page_above_the_limit_is_written_smaller(
    small: fi.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    # small runs fit whole; the budget must be tight for less of it to mean a smaller page
    monkeypatch.setattr("finfluence.workflows.report._writing.Budget", lambda: Budget(texts=5000, long_texts=20_000))
    whole = write_report(small, path, query="a").stat().st_size
    monkeypatch.setattr("finfluence.workflows.report._writing._LARGEST", whole - 1)
    assert write_report(small, path, query="a").stat().st_size < whole


def test_every_chart_is_valid_vega_lite() -> None:
    import altair as alt

    curve = pl.DataFrame(
        {"k": [0, 5, 9], "mu": [0.0, -1.0, -2.0], "ci_low": [0.0, -2, -3], "ci_high": [0.0, 0.0, -1.0]}
    )
    row = {"name": "a"} | {f"{kind}{end}": 1.0 for kind in ("predicted", "measured") for end in ("", "_low", "_high")}
    steps = pl.DataFrame({"step": [0, 1], "loss": [1.0, 100.0]})
    for spec in (
        charts.removal_chart(curve, curve, recommended=5),
        charts.agreement_chart(np.array([0.1, 0.2]), np.array([0.3, 0.4])),
        charts.verified_chart([row]),
        charts.line_chart(steps, y="loss", title="loss", description="loss", log=True),
        charts.signal_chart(0, 10),
        charts.tradeoff_chart(),
    ):
        assert spec["description"]
        alt.Chart.from_dict(spec, validate=True)


def test_thinning_keeps_both_ends() -> None:
    frame = pl.DataFrame({"step": np.arange(10_000)})
    found = charts.thin(frame, points=100)["step"].to_list()
    assert len(found) == 100
    assert (found[0], found[-1]) == (0, 9999)


def test_the_command_writes_where_it_is_told(small: fi.Run, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(small.directory), "--output", str(tmp_path / "page.html"), "--query", "b"])
    assert done.exit_code == 0, done.output
    assert "page.html" in done.output
    assert payload_of((tmp_path / "page.html").read_text(encoding="utf-8"))["query:0"]["name"] == "b"


def test_charting_libraries_load_only_when_a_report_is_written() -> None:
    code = (
        "import sys, finfluence.cli.report, finfluence.workflows.report._writing; "
        "assert not {'altair', 'jinja2', 'vl_convert', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
