"""Configuration files: everything is checked before anything is loaded, and every mistake is one line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finfluence.errors import InputError
from finfluence.workflows.configuration import parse_configuration, read_configuration

pytest.importorskip("pydantic")
ROOT = Path(__file__).parents[2]


def smallest(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "model": {"name": "org/model"},
        "data": {"dataset": "org/data"},
        "queries": {"q": {"completions": [{"prompt": "a", "completion": "b"}]}},
    }
    return content | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainning": {}}, "unknown key 'trainning'; did you mean 'training'"),
        ({"training": {"batch_sise": 4}}, "unknown key 'training.batch_sise'; did you mean 'batch_size'"),
        ({"model": {"name": "m", "lora": {"rank": 4}}}, "unknown key 'model.lora.rank'; known keys are r, alpha"),
        ({"queries": {"q": {"completion": []}}}, "unknown key 'queries.q.completion'; did you mean 'completions'"),
        ({"model": {"dtype": "float32"}}, "'model.name' is missing; it is required"),
        ({"training": {"batch_size": "many"}}, "'training.batch_size' is 'many': input should be a valid integer"),
        ({"training": {"optimizer": {"lr": -1}}}, "'training.optimizer.lr' is -1: input should be greater than 0"),
        ({"model": {"name": "m", "dtype": "int8"}}, "'model.dtype' is 'int8': input should be 'float64', 'float32'"),
        ({"data": {}}, "'data': give one of path"),
        ({"data": {"path": "a", "dataset": "b"}}, "'data': give one of path"),
        ({"queries": {}}, "'queries': give at least one query"),
        ({"queries": {"q": {}}}, "'queries.q': give one of completions, contrast and function, got none"),
        (
            {"queries": {"q": {"completions": "a.jsonl", "contrast_weight": 0.5}}},
            "'queries.q': contrast_weight belongs to a contrast",
        ),
        ({"queries": {"q": {"contrast": "a.jsonl", "contrast_weight": 0}}}, "'queries.q.contrast_weight' is 0"),
        ({"sensitivity": {"panel": {"positions": 1}}}, "'sensitivity.panel.positions' is 1"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_configuration(smallest(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_several_mistakes_are_counted_and_the_unknown_key_comes_first() -> None:
    with pytest.raises(InputError, match=r"unknown key 'model.nam'; did you mean 'name'\? \(and 1 more\)"):
        parse_configuration(smallest(model={"nam": "m"}))


def test_a_configuration_reads_back_as_it_was_written() -> None:
    found = parse_configuration(smallest(training={"optimizer": {"lr": "2e-4", "betas": [0.8, 0.9]}}))
    assert found.training.optimizer.lr == 2e-4
    assert parse_configuration(found.as_dict()) == found


def test_yaml_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    with pytest.raises(InputError, match=r"cannot read the configuration .*No such file"):
        read_configuration(file)
    for text, message in (
        ("model: [", "is not YAML"),
        ("just words", "holds str, not a configuration"),
        ("model: {name: a}\nmodel: {name: b}\n", "the key 'model' stands twice"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_configuration(file)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/model").mkdir()
    (tmp_path / "here/rows.jsonl").write_text("{}\n", encoding="utf-8")
    file = tmp_path / "here/c.yaml"
    text = "model: {name: model}\ndata: {path: rows.jsonl}\nqueries: {q: {completions: QUERY}}\noutput: runs/a\n"
    file.write_text(text.replace("QUERY", "rows.jsonl"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = read_configuration("here/c.yaml")
    assert found.model.name == str(tmp_path / "here/model")
    assert found.data.path == str(tmp_path / "here/rows.jsonl") == found.queries["q"].completions
    assert found.output == str(tmp_path / "runs/a")
    file.write_text(text.replace("QUERY", "missing.jsonl"), encoding="utf-8")
    with pytest.raises(InputError, match=r"queries.q.completions: there is no file .*missing.jsonl"):
        read_configuration(file)
    file.write_text(text.replace("name: model", "name: ./models/absent"), encoding="utf-8")
    with pytest.raises(InputError, match="there is no directory"):
        read_configuration(file)


@pytest.mark.parametrize("name", ["llama-3.1-8b-lora", "smollm2-135m-lora"])
def test_recipes_are_valid(name: str) -> None:
    found = read_configuration(ROOT / f"recipes/{name}.yaml")
    assert found.model.lora is not None
    assert {query.kind for query in found.queries.values()} == {"completions", "contrast"}
