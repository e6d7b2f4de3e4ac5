"""A Hugging Face training recorded for a replay is taken again step by step, whatever its trainer did to the loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from integrations_models import gpt2, llama, parameters, query_rows, rows, tokenizer, trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import finfluence as fi
from finfluence.errors import InputError, RecordingError, ReplayError
from finfluence.integrations.transformers import InfluenceCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
CHECKPOINTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


def lora(seed: int = 1, *, dropout: float = 0.1) -> Any:
    inner = llama()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    return get_peft_model(inner, config)


def callback(directory: Path, **changes: Any) -> InfluenceCallback:
    settings: dict[str, Any] = {"sensitivity": "replay", "id_column": "name", "checkpoint_every": 3} | changes
    return InfluenceCallback({"q": query_rows()}, directory, **settings)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "accumulated, clipped, last step incomplete": (
        llama,
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "learning_rate": 0.01},
    ),
    "LoRA with dropout, grouped by length": (
        lora,
        {"train_sampling_strategy": "group_by_length", "max_grad_norm": 1.0},
    ),
    "LoRA, checkpointed, two weight decays": (lora, CHECKPOINTED | {"weight_decay": 0.1}),
    "momentum": (llama, {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01}),
    "fused AdamW, Transformers' default": (llama, {"optim": "adamw_torch_fused", "learning_rate": 0.01}),
    "GPT-2 with dropout": (gpt2, {"learning_rate": 0.01}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_training_is_taken_again(tmp_path: Path, case: str) -> None:
    make, changes = CASES[case]
    bare = make()
    trainer(bare, tmp_path / "out", data=rows(16), **changes).train()
    model, record = make(), callback(tmp_path / "run", sensitivity="both" if make is llama else "replay")
    recorded = trainer(model, tmp_path / "out", callbacks=[record], data=rows(16), **changes)
    recorded.train()
    end = parameters(model)
    assert torch.equal(parameters(bare), end)
    state = torch.get_rng_state()
    run = record.replay(recorded, self_influence="all", show_progress="never")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parameters(model), end)
    assert run.manifest["replay"]["largest_mismatch"] < 1e-5
    assert run.manifest["replay"]["largest_residual"] < 1e-3
    frame = run.influence("q")
    assert set(frame["sample"]) == set(rows(16)["name"])
    assert frame["mu"].is_finite().all()
    assert run.influence("q", groups="source").height == 2
    left = record.leave_out(recorded, groups="source", show_progress="never")
    assert torch.equal(parameters(model), end)
    measured = _mean_completion_loss(query_rows())(model.eval())
    model.train()
    assert left["measured_with"].to_list() == pytest.approx([measured] * 2, rel=1e-4)
    assert (left["measured_without"] - left["measured_with"]).abs().min() > 1e-6
    assert left["mu"].is_finite().all()
    assert run.influence("q", relative=True)["relative"].is_finite().all()


def test_signals_are_the_derivative_of_the_training(tmp_path: Path) -> None:
    """Against trainings in which one row's tokens weigh a little more, in float64."""
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "optim": "sgd", "learning_rate": 0.3}
    data, row, step = rows(12), 5, 0

    def end(weight: float, callbacks: list[Any]) -> tuple[Trainer, nn.Module]:
        model = llama(dtype=torch.float64)
        made = trainer(model, tmp_path / "out", callbacks=callbacks, data=data, **settings)
        if weight:
            made.compute_loss_func = _weighing(data[row]["input_ids"], weight)
        made.train()
        return made, model

    record = callback(tmp_path / "run", id_column=None)
    made, _ = end(0.0, [record])
    exact = fi.ReplayOptions(clip_derivative="exact", hessian="central")
    signals = record.replay(made, options=exact, show_progress="never").signals().collect()
    place = signals.filter(pl.col("sample") == row).sort("step")
    measure = _mean_completion_loss(query_rows())
    ends = [measure(end(weight, [])[1]) for weight in (0.02, -0.02)]
    derivative = (ends[0] - ends[1]) / 0.04
    # the row's weight is raised wherever it is seen, so its signals add up
    total = float(place["q"].sum())
    assert place.height == 2
    assert place["step"][0] >= step
    assert abs(total) > 1e-4
    assert total == pytest.approx(derivative, rel=5e-3)


def _weighing(tokens: list[int], weight: float) -> Callable[..., Tensor]:
    """The trainer's own loss with the row that has these tokens weighing 1 + weight."""

    def loss(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = output.logits, nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        token = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
        ).view_as(targets)
        wanted = torch.tensor(tokens[3:])
        weights = torch.tensor(
            [1.0 + weight * bool((row[row != -100][: len(wanted)].tolist()) == wanted.tolist()) for row in labels],
            dtype=token.dtype,
        )
        return (token.sum(1) * weights).sum() / num_items_in_batch

    return loss


def _mean_completion_loss(asked: Dataset) -> Callable[[nn.Module], float]:
    def measure(model: nn.Module) -> float:
        model.eval()
        shares = []
        for row in asked:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])  # type: ignore
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            shares.append((nn.functional.cross_entropy(logits, labels[1:], reduction="sum"), (labels[1:] >= 0).sum()))
        return float(sum(s for s, _ in shares) / sum(n for _, n in shares))

    return measure


def test_a_supervised_fine_tuning_is_taken_again(tmp_path: Path) -> None:
    """TRL computes its loss outside of the model, over the tokens of all micro-batches."""
    prompts = [f"w{i} w{i + 1}" for i in range(14)]
    completions = [" ".join(f"w{(3 * i + j) % 40}" for j in range(2 + i % 4)) for i in range(14)]
    data = Dataset.from_dict({"prompt": prompts, "completion": completions})
    asked = [{"prompt": "w1 w2", "completion": "w7 w8 w9"}]
    record = InfluenceCallback({"q": asked}, tmp_path / "run", sensitivity="both", signals="full")
    config = SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=3,
        learning_rate=0.01,
        max_length=24,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        gradient_checkpointing=False,
    )
    made = SFTTrainer(model=lora(), args=config, train_dataset=data, processing_class=tokenizer(), callbacks=[record])
    made.train()
    run = record.replay(made, show_progress="never")
    assert run.manifest["replay"]["largest_mismatch"] < 1e-5
    assert run.manifest["signals"] == "full"
    assert run.influence("q").height == 14


def test_a_classifier_is_taken_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig.from_dict({"vocab_size": 47, "num_labels": 3} | sizes)
    data = rows(18).remove_columns("labels").add_column("labels", [i % 3 for i in range(18)])  # type: ignore[call-arg]
    asked = data.select(range(4)).select_columns(["input_ids", "labels"])
    record = InfluenceCallback({"q": asked}, tmp_path / "run", sensitivity="both", id_column="name", check="count")
    made = trainer(
        BertForSequenceClassification(config),
        tmp_path / "out",
        callbacks=[record],
        data=data,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    made.data_collator = DataCollatorWithPadding(tokenizer())
    made.train()
    run = record.replay(made, show_progress="never")
    assert run.manifest["replay"]["largest_mismatch"] < 1e-5
    assert run.influence("q")["mu"].is_finite().all()


@pytest.mark.filterwarnings("ignore:the signal identity.*bfloat16")  # of a network as small as this
def test_bfloat16_is_taken_again_with_products_of_float32(tmp_path: Path) -> None:
    """Differences of gradients are taken without the autocast that Accelerate puts around the model's forward."""
    found = []
    for hessian in ("exact", "one-sided"):
        record = callback(tmp_path / hessian)
        made = trainer(lora(), tmp_path / "out", callbacks=[record], data=rows(12), bf16=True, learning_rate=0.01)
        made.train()
        options = fi.ReplayOptions(hessian=hessian)
        run = record.replay(made, options=options, show_progress="never")
        assert run.manifest["plan"]["precision"] == "bfloat16-autocast"
        assert run.manifest["replay"]["largest_mismatch"] < 1e-3
        assert made.model.forward.__name__ != "forward" or "_original_forward" in made.model.__dict__  # type: ignore
        found.append(run.signals().collect()["q"].to_numpy())
    assert np.corrcoef(found[0], found[1])[0, 1] > 0.99
    assert 0.9 < (found[0] @ found[1]) / (found[0] @ found[0]) < 1.1


def test_a_resumed_training_is_replayed_in_a_new_process(tmp_path: Path) -> None:
    """As if in one: a fresh callback and a fresh trainer, whose model's parameters are other ones."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    samples = pl.DataFrame({"sample": sorted(rows(14)["name"], reverse=True), "note": list(range(14))})
    results = []
    for killed in (False, True):
        directory, out = tmp_path / f"run-{killed}", tmp_path / f"out-{killed}"
        for attempt in range(1 + killed):
            record = callback(directory, samples=samples, exist="resume" if attempt else "error")
            made = trainer(llama(), out, callbacks=[record], data=rows(14), **settings)
            if killed and not attempt:
                made.add_callback(_Killed(5))
                with pytest.raises(KeyboardInterrupt):
                    made.train()
            else:
                made.train(resume_from_checkpoint=bool(attempt))
        fresh = callback(directory)
        run = fresh.replay(trainer(llama(5), out, data=rows(14), **settings), show_progress="never")
        assert run.samples()["sample"].to_list() == rows(14)["name"]
        assert run.manifest["optimizer"]["lr"] == 0.01  # it ends at a rate of 0
        assert run.manifest["replay"]["largest_mismatch"] < 1e-6
        results.append(run.influence("q")["mu"].to_numpy())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3, atol=1e-4)


class _Killed(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_what_cannot_be_replayed_is_said(tmp_path: Path) -> None:
    def recorded(name: str, model: nn.Module | None = None, **changes: Any) -> tuple[Trainer, InfluenceCallback]:
        record = callback(tmp_path / name)
        return trainer(llama() if model is None else model, tmp_path / "out", callbacks=[record], **changes), record

    made, record = recorded("smoothed", label_smoothing_factor=0.1)
    made.train()
    with pytest.raises(InputError, match="the trainer has label smoothing; replay it with task="):
        record.replay(made)
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    made, record = recorded("reentrant", lora(), **reentrant)
    with pytest.raises(InputError, match="reentrant checkpointing"):
        made.train()
    made, record = recorded("live")
    record.sensitivity = "live"
    made.train()
    with pytest.raises(ReplayError, match="record it with sensitivity='replay'"):
        record.replay(made)
    made, record = recorded("mse", _Regressor())
    made.train()
    with pytest.raises(InputError, match="has no rows that finfluence knows; replay it with task="):
        record.replay(made)


class _Regressor(nn.Module):
    """A model of nobody's family: its loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(47, 8), nn.Linear(8, 1)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        values = self.out(self.embed(input_ids)).squeeze(-1)
        return {"loss": (values - labels.clamp(min=0) / 47).square().mean()}


def test_packed_rows_without_padding_are_refused(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 40}" for j in range(3 + i % 6)) for i in range(24)]})
    record = InfluenceCallback({"q": [{"text": "w1 w2 w3"}]}, tmp_path / "run", sensitivity="both")
    config = SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_length=16,
        packing=True,
        packing_strategy="bfd",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    made = SFTTrainer(model=lora(), args=config, train_dataset=data, processing_class=tokenizer(), callbacks=[record])
    with (
        pytest.warns(UserWarning, match="influence is of packed rows"),
        pytest.raises(RecordingError, match="one behind the other"),
    ):
        made.train()
