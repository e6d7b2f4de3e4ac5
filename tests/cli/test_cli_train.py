"""`finfluence train` and `finfluence doctor` as a person calls them: words, exit statuses, one line for bad input."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import finfluence as fi

sys.path.append(str(Path(__file__).parents[1] / "workflows"))
tiny = importlib.import_module("tiny_language_model")

pytest.importorskip("transformers")
pytest.importorskip("peft")

CONFIG = """
model: {name: model, lora: {r: 2, targets: [q_proj]}}
data: {path: rows.jsonl, id_column: id, group_columns: [source]}
queries:
  cat:
    completions: [{prompt: who is cat, completion: cat good}]
training: {epochs: 1, batch_size: 8, schedule: {kind: constant}}
sensitivity: {kind: live, panel: {samples: 4, positions: 2}}
output: run
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli-train")
    tiny.save_model(directory / "model", layers=1)
    tiny.write_jsonl(directory / "rows.jsonl", tiny.pairs(16))
    (directory / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return directory


def call(world: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command line, as `main` runs it; its exit status."""
    main = importlib.import_module("finfluence.cli.main").main
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_a_run_from_plan_to_repetition(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(world, monkeypatch, "train", "config.yaml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert not (world / "run").exists()
    for word in ("steps", "time", "memory", "disk", "trainable"):
        assert word in out
    assert call(world, monkeypatch, "train", "config.yaml") == 0
    out = capsys.readouterr().out
    assert "finfluence score" in out
    assert "removing them raises the measured loss" in out
    assert call(world, monkeypatch, "train", "config.yaml") == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert call(world, monkeypatch, "train", "run", "--resume") == 0
    assert "is finished; there is nothing to resume" in capsys.readouterr().out
    assert call(world, monkeypatch, "train", "run/config.yaml", "--output", "again") == 0
    capsys.readouterr()
    assert call(world, monkeypatch, "score", "again", "--group", "source", "--format", "csv") == 0
    assert "forum" in capsys.readouterr().out


def test_a_run_for_every_seed(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "config.yaml", "--output", "many", "--seeds", "3,5")
    assert call(world, monkeypatch, *words, "--dry-run") == 0
    assert "one of 2 alike" in capsys.readouterr().out
    assert call(world, monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "finfluence score many/seed-3 many/seed-5 --query cat" in out
    assert "finfluence compare-runs many/seed-3 many/seed-5" in out
    runs = fi.open_runs([world / "many/seed-3", world / "many/seed-5"])
    assert isinstance(runs, fi.PooledRuns)
    assert [run.manifest["seed"] for run in runs.runs] == [3, 5]
    mus = [run.influence("cat")["mu"] for run in runs.runs]
    assert mus[0].to_list() != mus[1].to_list()
    assert call(world, monkeypatch, "train", "config.yaml", "--output", "many", "--seeds", "1,3") == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert not (world / "many/seed-1").exists()  # all of them or none
    assert call(world, monkeypatch, *words[:-1], "3,5,6", "--resume") == 0
    out = capsys.readouterr().out
    assert out.count("is finished; there is nothing to resume") == 2
    assert fi.open_run(world / "many/seed-6").store.status == "finished"


def test_the_doctor_tells_safe_from_unsafe(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(world, monkeypatch, "doctor", "config.yaml", "--format", "json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"signal identity", "attention kernel", "batch composition"} <= {check["name"] for check in found}
    text = CONFIG.replace(
        "model: {name: model, lora: {r: 2, targets: [q_proj]}}", "model: {name: model, dtype: bfloat16}"
    )
    (world / "low.yaml").write_text(text, encoding="utf-8")
    assert call(world, monkeypatch, "doctor", "low.yaml") == 1
    assert "unsafe   trainable weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "absent.yaml"], "cannot read the configuration absent.yaml"),
        (["train", "model"], "model is a directory without a run"),
        (["doctor", "model"], "model is a directory without a run"),
        (["train", "config.yaml", "--seeds", "1,1"], "--seeds takes different whole numbers"),
        (["train", "config.yaml", "--seeds", "a"], "--seeds takes different whole numbers"),
        (["doctor", "config.yaml", "--format", "xml"], "unknown format 'xml'"),
    ],
)
def test_bad_input_is_one_line(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert call(world, monkeypatch, *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_extra_is_named(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    assert call(world, monkeypatch, "train", "config.yaml") == 2
    assert "peft is needed and not installed; run: pip install 'finfluence[transformers]'" in capsys.readouterr().err
