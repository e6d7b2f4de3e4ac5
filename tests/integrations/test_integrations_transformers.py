"""A recorded Hugging Face training is the bare one bit for bit, and its signals are what they are defined to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations_models import Collator, gpt2, llama, parameters, query_rows, rows, trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

import finfluence as fi
from finfluence.integrations.transformers import InfluenceCallback
from finfluence.runs import Contrast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
]
CHECKPOINTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


def lora(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    inner = llama(dtype=dtype)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout, init_lora_weights=False, **options
    )
    return get_peft_model(inner, config).to(dtype)


def adapter(seed: int = 1) -> Callable[[], nn.Module]:
    return lambda: lora(dropout=0.1)


BIT_IDENTICAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "clipped, accumulated, last step incomplete": (
        llama,
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "num_train_epochs": 2},
    ),
    "LoRA with dropout, grouped by length, a worker": (
        adapter(),
        {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1, "max_grad_norm": 1.0},
    ),
    "LoRA, checkpointed, dropping the last batch": (adapter(), CHECKPOINTED | {"dataloader_drop_last": True}),
    "bfloat16 autocast, momentum": (llama, {"bf16": True, "optim": "sgd", "optim_args": "momentum=0.9"}),
    "GPT-2 with dropout, label smoothing": (gpt2, {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("case", list(BIT_IDENTICAL))
def test_training_is_that_without_the_callback(tmp_path: Path, case: str) -> None:
    make, changes = BIT_IDENTICAL[case]
    data = rows(10)
    seen = []
    for recorded in (False, True):
        callbacks = (
            [InfluenceCallback({"q": query_rows()}, tmp_path / "run", id_column="name", refresh=2)] if recorded else []
        )
        model = make()
        run = trainer(
            model, tmp_path / "out", callbacks=list(callbacks), data=data, **{"num_train_epochs": 1} | changes
        )
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        seen.append((parameters(model), losses, torch.get_rng_state()))
        assert type(run.callback_handler.train_dataloader.base_dataloader.batch_sampler) is BatchSampler
        assert run.train_dataset is data
        assert not [m for m in model.modules() if m._forward_pre_hooks]
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    assert torch.equal(seen[0][2], seen[1][2])
    recorded_run = fi.open_run(tmp_path / "run")
    steps = recorded_run.steps()
    limit = 2e-2 if changes.get("bf16") else 1e-5
    assert steps["residual"].max() < limit  # pyright: ignore[reportOperatorIssue]
    assert (steps["scale"] < 0.99).all() == ("max_grad_norm" in changes)
    per_epoch = 8 if "dataloader_drop_last" in changes else 10
    epochs = int(changes.get("num_train_epochs", 1))
    assert steps["batch_size"].sum() == per_epoch * epochs
    assert steps["epoch"].to_list() == sorted(steps["epoch"].to_list())
    if "label_smoothing_factor" not in changes:  # the model does not see the smoothed loss
        np.testing.assert_allclose(steps["loss"].to_numpy(), seen[0][1], rtol=1e-6)
    frame = recorded_run.signals().collect()
    assert set(frame["sample"]) <= set(data["name"])
    assert recorded_run.influence("q", groups="source").height == 2


class Snapshots(TrainerCallback):
    """Keeps the parameters as they are before every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append({k: v.detach().clone() for k, v in kwargs["model"].state_dict().items()})


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trainable, found, strict=True)]
    )


def tokens_loss(model: nn.Module, row: dict[str, Any], count: int) -> Tensor:
    """Σ of the row's token losses / count, by the definition: logits, shifted labels, no collator."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / count


DEFINED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "full": (lambda: llama(dtype=torch.float64), {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2}),
    "tied, checkpointed": (lambda: llama(dtype=torch.float64, tied=True), CHECKPOINTED),
    "GPT-2": (lambda: gpt2(dtype=torch.float64, dropout=0.0), {}),
    "LoRA, reentrant": (lambda: lora(dtype=torch.float64), REENTRANT),
    "DoRA, accumulated": (lambda: lora(dtype=torch.float64, use_dora=True), {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", list(DEFINED))
def test_signals_equal_a_loop_over_samples(tmp_path: Path, case: str) -> None:
    # x_i = −lr · clip · ⟨∇m, ∇ Σ_t ℓ_it / (tokens of the step)⟩ at the parameters before every step
    make, changes = DEFINED[case]
    model, data, query = make(), rows(10), query_rows()
    snapshots = Snapshots()
    callback = InfluenceCallback({"q": query}, tmp_path / "run")
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "num_train_epochs": 1}
    trainer(model, tmp_path / "out", callbacks=[snapshots, callback], data=data, **settings | changes).train()
    run = fi.open_run(tmp_path / "run")
    frame, steps = run.signals().collect(), run.steps()
    model.gradient_checkpointing_disable()  # pyright: ignore[reportCallIssue]
    model.eval()
    batch = Collator(pad_token_id=0)([query[i] for i in range(3)])
    for step, state in enumerate(snapshots.states):
        model.load_state_dict(state)
        direction = gradient(model, model(**batch).loss)
        part = frame.filter(frame["step"] == step)
        members = part["sample"].to_list()
        count = sum(sum(label != -100 for label in data[i]["labels"][1:]) for i in members)
        scale = steps["scale"][step]
        expected = [
            -0.05 * scale * float(direction @ gradient(model, tokens_loss(model, data[i], count))) for i in members
        ]
        np.testing.assert_allclose(part["q"].to_numpy(), expected, rtol=2e-5, atol=1e-9)
    assert sorted(frame["sample"].to_list()) == list(range(10))


def test_queries_of_text_contrasts_and_functions(tmp_path: Path) -> None:
    # loss(first) − loss(second)/2 of completions, each the mean over its own tokens, then over rows
    model = llama(dtype=torch.float64)
    first = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}, {"prompt": "w6", "completion": "w7"}]
    second = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w9"}]}]
    queries = {
        "first": first,
        "second": second,
        "contrast": Contrast(first, second, weight=0.5),
        "norm": lambda net: net.lm_head.weight.square().sum(),
    }
    callback = InfluenceCallback(queries, tmp_path / "run", query_batch_size=1)
    settings = {"optim": "sgd", "num_train_epochs": 1}
    trainer(model, tmp_path / "out", callbacks=[callback], data=rows(8), **settings).train()
    frame = fi.open_run(tmp_path / "run").signals().collect()
    assert frame.columns[2:] == list(queries)
    assert (frame["norm"] != 0).all()
    np.testing.assert_allclose(frame["contrast"], frame["first"] - frame["second"] / 2, rtol=1e-4, atol=1e-8)
