"""TRL's SFTTrainer: prepared, dropped and packed rows, and the fused head, give the bare training and true signals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from integrations_models import llama, parameters, tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError
from finfluence.integrations.transformers import InfluenceCallback

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")]
QUERY = [{"prompt": [{"role": "user", "content": "w1 w2"}], "completion": "w3 w4"}]


def lora() -> nn.Module:
    inner = llama()
    torch.manual_seed(1)
    return get_peft_model(inner, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def sft(model: nn.Module, folder: Path, data: Dataset, callbacks: list[Any], **changes: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_length": 24,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(settings | changes)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def conversation(i: int) -> dict[str, Any]:
    answer = " ".join(f"w{(7 * i + j) % 40}" for j in range(2 + i % 3))
    # row 3's prompt fills the row, so that TRL drops it
    question = " ".join(["w9"] * (30 if i == 3 else 2))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "name": f"row-{i}",
    }


@pytest.mark.parametrize("named", [True, False])
def test_dropped_rows_keep_their_names(tmp_path: Path, named: bool) -> None:
    data = Dataset.from_list([conversation(i) for i in range(9)])
    bare, recorded = lora(), lora()
    sft(bare, tmp_path / "out", data, [], shuffle_dataset=True).train()
    callback = InfluenceCallback({"q": QUERY}, tmp_path / "run", id_column="name" if named else None)
    run = sft(recorded, tmp_path / "out", data, [callback], shuffle_dataset=True)
    run.train()
    assert torch.equal(parameters(bare), parameters(recorded))
    expected = [i for i in range(9) if i != 3]
    found = fi.open_run(tmp_path / "run")
    assert sorted(found.signals().collect()["sample"]) == ([f"row-{i}" for i in expected] if named else expected)
    assert found.steps()["residual"].max() < 1e-5  # pyright: ignore[reportOperatorIssue]


def test_the_fused_head_of_full_fine_tuning_is_accounted_for(tmp_path: Path) -> None:
    # the head's weight is used past its module; finite differences of the whole model stand in
    data = Dataset.from_list([conversation(i) for i in range(9) if i != 3])
    callback = InfluenceCallback({"q": QUERY}, tmp_path / "run")
    sft(llama(tied=True), tmp_path / "out", data, [callback]).train()
    assert fi.open_run(tmp_path / "run").steps()["residual"].max() < 2e-2  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_have_their_own_signals(tmp_path: Path, strategy: str) -> None:
    # bfd batches are one long row without padding: x_i from the tokens of packed row i, checked against autograd
    words = [" ".join(f"w{(i * i + j) % 40}" for j in range(3 + i % 6)) for i in range(24)]
    data = Dataset.from_dict({"text": words})
    bare, recorded = lora(), lora()
    options: dict[str, Any] = {"packing": True, "packing_strategy": strategy, "max_length": 16}
    sft(bare, tmp_path / "out", data, [], **options).train()
    run = sft(recorded, tmp_path / "out", data, [InfluenceCallback({"q": QUERY}, tmp_path / "run")], **options)
    with pytest.warns(FinfluenceWarning, match="influence is of packed rows"):
        run.train()
    assert torch.equal(parameters(bare), parameters(recorded))
    found = fi.open_run(tmp_path / "run")
    assert found.manifest["unit"] == "packed row"
    frame = found.signals().collect()
    first = frame.filter(frame["step"] == 0)
    fresh = lora()
    fresh.config.use_cache = False  # with a cache, documents are not kept apart; trainers switch it off  # type: ignore
    trainable = [p for p in fresh.parameters() if p.requires_grad]
    packed = run.train_dataset
    assert packed is not None

    def own_loss(i: int) -> torch.Tensor:
        batch = run.data_collator([packed[i]])
        labels = batch["labels"][:, 1:]
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "attention_mask")}
        logits = fresh(**inputs).logits[:, :-1]
        return nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable)])

    members = first["sample"].to_list()
    rows = [run.data_collator([packed[i]])["labels"][:, 1:] for i in members]
    count = sum(int((row != -100).sum()) for row in rows)
    ids = torch.tensor(
        [
            tokenizer().apply_chat_template(
                QUERY[0]["prompt"] + [{"role": "assistant", "content": "w3 w4"}],
                return_dict=True,  # type: ignore[operator]
            )["input_ids"]
        ]
    )
    labels = ids.clone()
    labels[:, :-3] = -100
    direction = gradient(fresh(input_ids=ids, labels=labels).loss)
    expected = [-0.05 * float(direction @ gradient(own_loss(i))) / count for i in members]
    np.testing.assert_allclose(first["q"].to_numpy(), expected, rtol=2e-3, atol=1e-7)


def test_ids_of_packed_rows_are_refused(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(24)], "name": list(range(24))})
    callback = InfluenceCallback({"q": QUERY}, tmp_path / "run", id_column="name")
    with pytest.raises(InputError, match="packing puts several rows into one"):
        sft(lora(), tmp_path / "out", data, [callback], packing=True, max_length=16).train()
