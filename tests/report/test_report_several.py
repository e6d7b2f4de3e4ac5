"""The report of several runs as one: it has what they say together and each by itself, and where it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer
from report_runs import VERIFIED, payload_of, prose, synthetic_run
from typer.testing import CliRunner

import finfluence as fi
from finfluence.cli.report import report
from finfluence.errors import InputError
from finfluence.workflows.comparison import compare_runs
from finfluence.workflows.report import _charts as charts
from finfluence.workflows.report import write_report
from finfluence.workflows.report._health import Check, combined_checks

N = 80


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> fi.PooledRuns:
    samples = pl.DataFrame({"sample": np.arange(N), "text": prose(N, seed=0), "source": ["web", "forum"] * (N // 2)})
    folder = tmp_path_factory.mktemp("several")
    return fi.PooledRuns(
        [synthetic_run(folder / f"seed-{k}", samples, queries=("a", "b"), batch=10, rerun=k) for k in (1, 2, 3)]
    )


@pytest.fixture(scope="module")
def page(pooled: fi.PooledRuns) -> Path:
    return pooled.report()


def test_the_page_has_the_pool_and_every_run(pooled: fi.PooledRuns, page: Path) -> None:
    assert page == Path(pooled.runs[0].directory).parent / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "Influence report: seed-1, seed-2, seed-3" in text
    assert "averaged over 3 recorded runs" in text
    payload = payload_of(text)
    for place, query in enumerate(("a", "b")):
        frame = pooled.influence(query)
        np.testing.assert_allclose(payload[f"mu:{place}"], frame["mu"].to_numpy(), rtol=1e-5)
        rows = payload[f"each-rows:{place}"]
        each = payload[f"each-mu:{place}"].reshape(len(rows), 3)
        # every run's own μ is in the pool's unit, so that the pool is their mean
        np.testing.assert_allclose(each.mean(axis=1), frame["mu"].to_numpy()[rows], rtol=1e-5)
        own = np.array([np.asarray(one["q_value"] <= 0.05) for one in pooled.each(query)])
        assert payload[f"each-certain:{place}"].tolist() == own.sum(axis=0)[rows].tolist()
        section = payload[f"query:{place}"]["runs"]
        found = compare_runs(pooled.runs, query, top=(0.1,))
        assert ["Jaccard", "top 10 %", f"{found.figure('Jaccard', 'top 10 %').value:.2f}"] in [
            row[:3] for row in section["table"]
        ]
        assert f"{len(found.agreed):,} samples are certainly harmful in every run" in section["text"]


def test_a_single_run_has_no_such_section(pooled: fi.PooledRuns, tmp_path: Path) -> None:
    payload = payload_of(write_report(pooled.runs[0], tmp_path / "one.html").read_text(encoding="utf-8"))
    assert payload["query:0"]["runs"] is None
    assert "each-mu:0" not in payload


def test_runs_name_what_they_differ_in(pooled: fi.PooledRuns, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<dt>seed</dt><dd>1; 2; 3</dd>" in text
    good, bad = Check("Precision", "float32", "fine", "exact"), Check("Precision", "bfloat16", "look", "rounded")
    assert combined_checks({"a": [good], "b": [good]}) == [good]
    assert combined_checks({"a": [good], "b": [bad]}) == [
        Check("Precision", "a: float32; b: bfloat16", "look", "rounded")
    ]


def test_runs_that_lie_apart_must_say_where(pooled: fi.PooledRuns, tmp_path: Path) -> None:
    samples = pooled.samples()
    apart = synthetic_run(tmp_path / "elsewhere" / "run", samples, queries=("a", "b"), batch=10, rerun=4)
    both = fi.PooledRuns([pooled.runs[0], apart])
    with pytest.raises(InputError, match="different folders"):
        both.report()
    assert both.report(tmp_path / "both.html").exists()
    with pytest.raises(InputError, match="nope"):
        both.report(tmp_path / "both.html", query="nope")


def test_verified_predictions_of_a_pool_are_not_those_of_its_first_run(pooled: fi.PooledRuns, tmp_path: Path) -> None:
    first = pooled.runs[0]
    entry = VERIFIED | {"query": "a"}
    of_pool = entry | {"name": "cut of three", "recordings": ["seed-1", "seed-2", "seed-3"]}
    target = Path(first.directory) / "verified.json"
    target.write_text(json.dumps([entry, of_pool]), encoding="utf-8")
    try:
        for run, name in ((first, "cut"), (pooled, "cut of three"), (fi.PooledRuns(pooled.runs[:2]), None)):
            found = payload_of(write_report(run, tmp_path / "v.html").read_text(encoding="utf-8"))["query:0"]
            shown = found["verified"]
            assert (shown and [row[0] for row in shown["table"]]) == (name and [name])
            assert ("measured by retraining" in found["removal"]["text"]) == (name is not None)
    finally:
        target.unlink()


def test_the_command_takes_several(pooled: fi.PooledRuns, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    target = tmp_path / "page.html"
    done = CliRunner().invoke(app, [*(str(run.directory) for run in pooled.runs), "-o", str(target), "--query", "b"])
    assert done.exit_code == 0, done.output
    assert payload_of(target.read_text(encoding="utf-8"))["query:0"]["runs"]["table"]


def test_the_chart_of_runs_is_valid_vega_lite() -> None:
    import altair as alt

    rows = [{"sample": "7", "mu": -1.0, "low": -2.0, "high": -0.5, "each": {"seed-1": -1.2, "seed-2": -0.8}}]
    alt.Chart.from_dict(charts.runs_chart(rows), validate=True)


def test_a_chosen_sample_shows_what_each_run_says(show: Callable[..., Any], pooled: fi.PooledRuns, page: Path) -> None:
    browser = show(page)
    assert browser.find_element("id", "runs").is_displayed()
    assert not browser.find_element("id", "agreement").is_displayed()
    facts = dict(
        zip(
            (e.text for e in browser.find_elements("css selector", "#chosen-facts dt")),
            (e.text for e in browser.find_elements("css selector", "#chosen-facts dd")),
            strict=True,
        )
    )
    lowest = int(pooled.influence("a").sort("mu")["sample"][0])
    each = [frame.filter(pl.col("sample") == lowest)["mu"][0] for frame in pooled.each("a")]
    assert facts["μ in each run"].replace("−", "-") == ", ".join(f"{mu:+.2f}" for mu in each)
    assert facts["certain in"].endswith("of 3 runs")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
