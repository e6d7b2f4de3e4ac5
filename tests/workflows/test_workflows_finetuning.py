"""Recorded fine-tuning of a tiny random Llama with LoRA: data in, run out, and every kind of bad input before training.

Protects: the run carries what repeats it; its states hold trainable parameters alone; a killed run's signals equal an
uninterrupted one's; a replay by finite differences agrees with the exact one.
"""

from __future__ import annotations

import copy
import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_language_model as tiny
import yaml
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from finfluence.errors import InputError, StoreError
from finfluence.runs import Contrast, Retraining, Run
from finfluence.runs.oracle import Processes
from finfluence.runs.oracle.problem import Job
from finfluence.runs.oracle.single import train_one
from finfluence.workflows import load_recipe
from finfluence.workflows.configuration import parse_configuration
from finfluence.workflows.finetuning import FineTuning, check_resumed, fine_tune, make_replay_options, prepare
from finfluence.workflows.rehearsal import rehearse

ROOT = Path(__file__).parents[2]


def answer_length(model: Any, tokenizer: Any) -> Tensor:
    """A function query: the logit of the end token behind one prompt."""
    import torch

    ids = torch.tensor([tokenizer("who is cat")["input_ids"]])
    return model(input_ids=ids).logits[0, -1, tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and 24 rows."""
    directory = tmp_path_factory.mktemp("world")
    tiny.save_model(directory / "model")
    tiny.write_jsonl(directory / "rows.jsonl", tiny.pairs(24))
    return directory


def content(world: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of six steps; `changes` by dotted names, with __ for the dots."""
    found = tiny.configuration(world)
    found["queries"]["ends"] = {"function": f"{__name__}:answer_length"}
    for name, value in changes.items():
        *path, last = name.split("__")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return found


def prepared(world: Path, **changes: Any) -> FineTuning:
    return prepare(parse_configuration(content(world, **changes)))


@pytest.fixture(scope="module")
def run(world: Path) -> Run:
    return fine_tune(prepared(world), world / "run", show_progress="never")


def test_a_run_has_signals_text_groups_and_what_repeats_it(world: Path, run: Run) -> None:
    samples = run.samples()
    assert samples.columns == ["sample", "prompt", "completion", "source", "content_hash"]
    assert samples.row(1, named=True)["prompt"] == "who is dog"
    assert run.influence("cat")["mu"].is_finite().all()
    assert run.influence("mayor", groups="source").height == 2
    assert run.manifest["source"] == {"path": str(world / "rows.jsonl"), "format": "jsonl", "id_column": "id"}
    written = parse_configuration(yaml.safe_load((world / "run/config.yaml").read_text(encoding="utf-8")))
    assert written.data.format == "chat"
    assert written.output == str(world / "run")
    packages = json.loads((world / "run/environment.json").read_text(encoding="utf-8"))["packages"]
    assert {"torch", "transformers", "peft"} <= set(packages)


def test_the_written_configuration_repeats_the_run(world: Path, run: Run) -> None:
    written = parse_configuration(yaml.safe_load((world / "run/config.yaml").read_text(encoding="utf-8")))
    again = fine_tune(prepare(written), world / "again", show_progress="never")
    assert again.signals().collect().equals(run.signals().collect())


def test_states_hold_the_adapter_alone(world: Path, run: Run) -> None:
    """Else a replay of a large model would store its frozen weights again and again."""
    state = load_file(sorted((world / "run/states").iterdir())[-1])
    trained = {name for name in state if name.startswith("parameter/")}
    assert trained
    assert all("lora_" in name for name in trained)
    frozen = sum(t.numel() for n, t in state.items() if not n.startswith(("parameter/", "optimizer/")))
    assert frozen < 100  # rotary frequencies


def test_a_killed_run_goes_on_where_it_was(world: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from finfluence.runs._loop import RecordingLoop

    step = RecordingLoop._step

    def dying(self: Any, batch: Any) -> None:
        if batch.step == 5:
            raise KeyboardInterrupt
        step(self, batch)

    work = prepared(world)
    monkeypatch.setattr(RecordingLoop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(work, world / "killed", show_progress="never")
    monkeypatch.undo()
    assert (world / "killed/config.yaml").is_file()
    with pytest.raises(StoreError, match="already holds a run"):
        fine_tune(work, world / "killed", show_progress="never")
    resumed = fine_tune(work, world / "killed", exist="resume", show_progress="never")
    assert resumed.signals().collect().equals(run.signals().collect())


def test_resuming_another_configuration_is_refused(world: Path, run: Run) -> None:
    with pytest.raises(InputError, match=r"training.epochs was 2 and is now 3; resume it as it was"):
        check_resumed(prepared(world, training__epochs=3), world / "run")
    check_resumed(prepared(world, output="elsewhere"), world / "run")


def test_difference_products_replay_like_exact_ones(world: Path, run: Run) -> None:
    """Six steps of a smooth model: one-sided differences in float32 leave some per mille of the signals."""
    exact = fine_tune(prepared(world, sensitivity__hessian="exact"), world / "exact", show_progress="never")
    for query in ("cat", "mayor", "ends"):
        a, b = (r.signals().sort("step", "sample").collect()[query].to_numpy() for r in (run, exact))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_a_source_is_left_out_along_the_recorded_path(world: Path, run: Run) -> None:
    """With the model, the data and the queries that the run's own configuration gives; functions are queries, too."""
    frame = run.leave_out(groups="source")
    assert frame["query"].unique(maintain_order=True).to_list() == list(run.queries)
    assert frame["group"].unique(maintain_order=True).to_list() == sorted(run.samples()["source"].unique())
    assert frame["mu"].is_finite().all()
    assert (frame["unit"] > 0).all()
    assert (frame["measured_with"] != frame["measured_without"]).all()
    assert (world / "run/left_out.json").is_file()


def test_the_recipe_retrains_and_notices_other_data(world: Path, run: Run, tmp_path: Path) -> None:
    recipe = load_recipe(run.manifest["recipe"])
    assert recipe.executor == "processes"
    experiment = Retraining(
        recipe.task,
        recipe.make_model,
        recipe.dataset,
        recipe.queries,
        subsets={"book": run.samples().filter(pl.col("source") == "book")["sample"].to_list()},
        optimizer=recipe.plan.optimizer,
        epochs=1,
        batch_size=8,
        ids=run.samples()["sample"].to_numpy(),
        collate=recipe.collate,
        executor="processes",
        directory=tmp_path / "truth",
        progress=False,
    )
    # what a worker process does, here: it gets the problem pickled and does one training after the other
    problem = pickle.loads(Processes().open(experiment.problem).payload)
    found = [train_one(problem, Job(arm, run, 7 + run)) for arm in problem.arms for run in range(2)]
    assert [outcome.error for outcome in found] == [None] * 4
    values = np.array([outcome.values for outcome in found if outcome.values is not None])
    assert (np.ptp(values, axis=0) > 0).all()
    changed = copy.deepcopy(run.manifest["recipe"])
    rows = tiny.pairs(24)
    rows[3]["completion"] = "something else"
    changed["arguments"]["configuration"]["data"]["path"] = str(tiny.write_jsonl(tmp_path / "other.jsonl", rows))
    with pytest.raises(InputError, match=r"other.jsonl changed since the run was recorded"):
        load_recipe(changed)


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved", "messages", "text"])
def test_every_form_of_data_gives_examples(world: Path, tmp_path: Path, kind: str) -> None:
    rows = tiny.pairs(9)
    changes: dict[str, Any] = {"data__group_columns": []}
    if kind == "csv":
        with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        changes["data__path"] = str(tmp_path / "rows.csv")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        changes["data__path"] = str(tmp_path / "rows.parquet")
    elif kind == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        changes |= {"data__path": None, "data__dataset": str(tmp_path / "saved")}
    elif kind == "messages":
        turns = [
            {
                "id": r["id"],
                "messages": [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r["completion"]},
                ],
            }
            for r in rows
        ]
        changes["data__path"] = str(tiny.write_jsonl(tmp_path / "rows.jsonl", turns))
    else:
        texts = [{"id": r["id"], "text": r["completion"]} for r in rows]
        changes["data__path"] = str(tiny.write_jsonl(tmp_path / "rows.jsonl", texts))
    found = prepared(world, **changes).examples
    expected = prepared(world, data__path=str(tiny.write_jsonl(tmp_path / "plain.jsonl", rows))).examples
    assert found.samples["sample"].to_list() == [row["id"] for row in rows]
    if kind == "text":
        assert found.format == "text"
        assert all(row["labels"] == row["input_ids"] for row in found.tokens)
        return
    assert found.tokens == expected.tokens
    assert all(-100 in row["labels"] for row in found.tokens)
    assert found.samples["completion"].to_list() == [row["completion"] for row in rows]
    assert ("content_hash" in found.samples.columns) == (kind == "saved")


def test_queries_are_masked_batches(world: Path) -> None:
    queries = prepared(world).recipe.queries
    labels = queries["cat"]["labels"]
    assert int((labels != -100).sum()) == 3  # cat, good, end of turn
    assert isinstance(queries["mayor"], Contrast)
    assert queries["mayor"].first["input_ids"].shape == queries["mayor"].second["input_ids"].shape


def test_a_dry_run_tells_time_memory_and_disk_and_leaves_nothing(world: Path) -> None:
    before = sorted(world.iterdir())
    found = rehearse(prepared(world, sensitivity__kind="both"))
    assert sorted(world.iterdir()) == before
    assert found.steps == 6
    assert found.replay is not None
    assert found.seconds > found.training_seconds > 0
    # four states of the adapter and Adam's two moments, and the signals
    assert found.disk_bytes > 4 * 3 * 4 * found.trainable
    assert "trainable" in str(found)


BAD = {
    "chat without template": ({"data__format": "chat", "model__tokenizer": "plain"}, "tokenizer has no chat template"),
    "empty completion": (
        {"rows": {3: {"completion": " "}, 7: {"completion": ""}}},
        "2 of 24 rows have no answer .* row 3",
    ),
    "missing id": ({"rows": {5: {"id": None}}}, "1 of 24 rows have no id in column 'id', the first is row 5"),
    "id twice": ({"rows": {5: {"id": "row-001"}}}, "the id 'row-001' stands twice in column 'id', in rows 1 and 5"),
    "no id column": ({"data__id_column": "name"}, "no column 'name'; set data.id_column to names among"),
    "no group column": ({"data__group_columns": ["topic"]}, "no column 'topic'; set data.group_columns"),
    "no text column": ({"data__columns": {"prompt": "question"}}, "none of the columns 'messages', 'question'"),
    "long query": (
        {"queries": {"q": {"completions": [{"prompt": "who " * 70, "completion": "cat"}]}}},
        r"query 'q', row 0 has \d+ tokens, more than the context of 64",
    ),
    "empty query": (
        {"queries": {"q": {"completions": [{"prompt": "who"}]}}},
        "query 'q', row 0 has no 'completion' text",
    ),
    "half a contrast": (
        {"queries": {"q": {"contrast": [{"prompt": "who", "completion": "cat"}]}}},
        "query 'q', row 0 has no 'against' text",
    ),
    "no such function": ({"queries": {"q": {"function": "nowhere:f"}}}, "'nowhere:f' cannot be imported"),
    "small data": ({"training__batch_size": 25}, "24 rows, fewer than a batch of 25; lower training.batch_size"),
    "long rows": ({"data__max_length": 65}, "the model's context is 64 tokens; lower data.max_length"),
    "cut to nothing": (
        {"data__max_length": 5},
        "24 of 24 rows have no token of their completion within data.max_length 5",
    ),
    "no such model": ({"model__name": "org/absent"}, "cannot load the tokenizer of 'org/absent': "),
    "no such dataset": (
        {"data__path": None, "data__dataset": "org/absent"},
        "cannot load the dataset 'org/absent'",
    ),
    "no such device": ({"training__device": "gpu"}, "unknown device 'gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_training(world: Path, tmp_path: Path, name: str) -> None:
    changes, message = copy.deepcopy(BAD[name])
    if broken := changes.pop("rows", None):
        rows = tiny.pairs(24)
        for i, change in broken.items():
            rows[i] |= change
        changes["data__path"] = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    if changes.get("model__tokenizer"):
        changes["model__tokenizer"] = str(tiny.save_model(tmp_path / "plain", template=False))
    with pytest.raises(InputError, match=message) as error:
        prepared(world, **changes)
    assert "\n" not in str(error.value)


def test_an_adapter_that_matches_nothing_names_what_there_is(world: Path, tmp_path: Path) -> None:
    work = prepared(world, model__lora__targets=["attn.c_proj"])
    with pytest.raises(
        InputError, match=r"no trainable parameters: .*linear modules of this model are called down_proj"
    ):
        fine_tune(work, tmp_path / "run", show_progress="never")
    assert not (tmp_path / "run").exists()


def test_the_llama_recipe_runs_at_small_size(tmp_path: Path) -> None:
    """recipes/llama-3.1-8b-lora.yaml with nothing changed but where model and data are, and the amount of both.

    Grouped-query attention, llama3 rope scaling, bfloat16 weights, gradient checkpointing, accumulation, live signals.
    """
    found = yaml.safe_load((ROOT / "recipes/llama-3.1-8b-lora.yaml").read_text(encoding="utf-8"))
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    words = [*tiny.WORDS, *(f"w{i}" for i in range(40))]
    found["model"]["name"] = str(tiny.save_model(tmp_path / "llama", context=128, rope_scaling=rope, words=words))
    rows = [{"instruction": r["prompt"], "response": r["completion"], "category": r["source"]} for r in tiny.pairs(32)]
    del found["data"]["dataset"]
    found["data"] |= {"path": str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)), "max_length": 64}
    found["training"] |= {"epochs": 2, "batch_size": 16, "accumulation": 2}
    found["sensitivity"] |= {"refresh": 1, "panel": {"samples": 4, "positions": 2}}
    run = fine_tune(prepare(parse_configuration(found)), tmp_path / "run", show_progress="never")
    assert run.influence("opinion", groups="category")["mu"].is_finite().all()
    assert run.manifest["largest_residual"] < 2e-2


@pytest.mark.parametrize(("asked", "measured"), [([0.5, 2], (0.5, 2)), ("second-half", (1, 2)), (None, (2,))], ids=str)
def test_what_is_measured_is_part_of_the_configuration(
    world: Path, tmp_path: Path, asked: Any, measured: tuple[int, ...]
) -> None:
    work = prepared(world, sensitivity__measure_epochs=asked)
    assert make_replay_options(work.configuration.sensitivity).measured(2) == measured
    run = fine_tune(work, tmp_path / "run", show_progress="never")
    assert run.measured_epochs == measured
    # the configuration that the run carries says so, too
    again = prepare(parse_configuration(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())))
    assert make_replay_options(again.configuration.sensitivity).measured(2) == measured
