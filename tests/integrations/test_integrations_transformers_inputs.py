"""What cannot be recorded is refused in one line before training starts; a killed training resumes with its run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from integrations_models import Collator, arguments, llama, query_rows, rows, trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

import finfluence as fi
from finfluence.errors import FinfluenceError, InputError, RecordingError, StoreError
from finfluence.integrations._checks import check_arguments
from finfluence.integrations.transformers import InfluenceCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


class Started(TrainerCallback):
    """Whether any step began."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


def refused(
    folder: Path, message: str, *, model: nn.Module | None = None, data: Any = None, queries: Any = None, **options: Any
) -> None:
    """Training with the callback is refused before its first step, and leaves no hooks behind."""
    model, started = llama() if model is None else model, Started()
    settings = options.pop("arguments", {})
    callback = InfluenceCallback({"q": query_rows()} if queries is None else queries, folder / "run", **options)
    run = trainer(model, folder / "out", callbacks=[started, callback], data=data, **settings)
    with pytest.raises(FinfluenceError, match=message) as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert started.steps == 0
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_bad_ids_are_refused(tmp_path: Path) -> None:
    data = rows(8)
    names = data["name"]
    missing = data.remove_columns("name").add_column("name", [None if i == 5 else n for i, n in enumerate(names)])
    twice = data.remove_columns("name").add_column("name", [names[2] if i == 6 else n for i, n in enumerate(names)])
    refused(tmp_path, "no id in 1 of 8 rows, the first is row 5", data=missing, id_column="name")
    refused(tmp_path, "names rows 2 and 6 both 'row-002'", data=twice, id_column="name")
    refused(tmp_path, "no column 'nam'; it has input_ids", data=data, id_column="nam")
    refused(tmp_path, "3 entries for a training set of 8 rows", data=data, ids=[1, 2, 3])
    refused(tmp_path, "must all be integers", data=data, ids=[0.5] * 8)


def test_bad_data_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "3 rows, fewer than the 4", data=rows(3))
    refused(tmp_path, "6 rows, fewer than the 8", data=rows(6), arguments={"gradient_accumulation_steps": 2})
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 6], "labels": [5, 6]}] * 9))
    refused(tmp_path, "iterable dataset", data=stream, arguments={"max_steps": 2})


def test_bad_queries_are_refused(tmp_path: Path) -> None:
    long = {"prompt": " ".join(["w1"] * 70), "completion": "w2"}
    for query, message in (
        ([long], r"row 0 of query 'q' has 72 tokens, more than the context of 64"),
        (rows(2, shortest=70, longest=70), "70 tokens, more than the context of 64"),
        ([{"prompt": "w1", "completion": ""}], "row 0 of query 'q' has an empty completion"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], "does not end with an assistant's message"),
        ([], "no rows"),
        (3.0, "query 'q' is float"),
        ([{"other": 1}], "cannot make a batch of query 'q'"),
        (lambda model: torch.zeros(()), "query 'q': the query's value has no gradient"),
        (lambda model: model.lm_head.weight.sum() * float("nan"), "query 'q': the query's value is nan"),
    ):
        refused(tmp_path, message, queries={"q": query}, data=rows(8))
    with pytest.raises(InputError, match="queries must map names"):
        InfluenceCallback({}, tmp_path / "run")


class IgnoresLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.head = nn.Linear(8, 60)

    def forward(self, input_ids: torch.Tensor, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        return {"logits": self.head(self.embedding(input_ids))}


def test_models_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    frozen = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True))
    refused(tmp_path, "adapter 'default' has no trainable parameters", model=frozen, data=rows(8))
    query = {"q": lambda model: model.head.weight.square().sum()}
    refused(tmp_path, "returned no loss", model=IgnoresLabels(), data=rows(8), queries=query)
    refused(tmp_path, "optimizer .*Adafactor is not supported", data=rows(8), arguments={"optim": "adafactor"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("world_size", 2, "2 processes"),
        ("n_gpu", 2, "DataParallel"),
        ("fsdp", "full_shard", "FSDP"),
        ("deepspeed", {"zero": 1}, "DeepSpeed"),
        ("torch_compile", True, "torch_compile"),
        ("auto_find_batch_size", True, "auto_find_batch_size"),
    ],
)
def test_settings_that_spread_or_repeat_a_batch_are_refused(name: str, value: Any, message: str) -> None:
    check_arguments(SimpleNamespace())
    with pytest.raises(RecordingError, match=message):
        check_arguments(SimpleNamespace(**{name: value}))


def test_a_collator_that_reorders_rows_is_found_out(tmp_path: Path) -> None:
    inner = Collator(pad_token_id=0)
    model = llama()
    run = Trainer(
        model=model,
        args=arguments(tmp_path / "out"),
        train_dataset=rows(8),
        data_collator=lambda items: inner(items[::-1]),
        callbacks=[InfluenceCallback({"q": query_rows()}, tmp_path / "run")],
    )
    with pytest.raises(RecordingError, match="does not hold the tokens of row"):
        run.train()
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert fi.open_run(tmp_path / "run").manifest["status"] == "failed"


class Killed(TrainerCallback):
    """An exception in the training loop that the callback is not told of."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_training_resumes_to_the_same_signals(tmp_path: Path) -> None:
    # resumed in the middle of an epoch, behind a checkpoint that is older than the last recorded step
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}

    def start(run: str, out: str, extra: list[Any], model: nn.Module, **options: Any) -> Trainer:
        callback = InfluenceCallback({"q": query_rows()}, tmp_path / run, id_column="name", **options)
        return trainer(model, tmp_path / out, callbacks=[callback, *extra], data=rows(14), **settings)

    start("whole", "out-whole", [], llama()).train()
    model = llama()
    with pytest.raises(KeyboardInterrupt):
        start("parts", "out-parts", [Killed(6)], model).train()
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert fi.open_run(tmp_path / "parts").manifest["status"] == "failed"
    with pytest.raises(StoreError, match="already holds a run"):
        start("parts", "out-parts", [], llama()).train()
    start("parts", "out-parts", [], llama(), exist="resume").train(resume_from_checkpoint=True)
    whole, parts = fi.open_run(tmp_path / "whole"), fi.open_run(tmp_path / "parts")
    assert parts.manifest["status"] == "finished"
    assert parts.steps()["step"].to_list() == list(range(8))
    assert whole.signals().collect().equals(parts.signals().collect())
    assert whole.steps().drop("loss").equals(parts.steps().drop("loss"))
