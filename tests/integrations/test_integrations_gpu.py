"""On a CUDA GPU: a recorded Hugging Face training is the bare one bit for bit, and the identity holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_models import llama, parameters, query_rows, rows, trainer
from peft import LoraConfig, get_peft_model

import finfluence as fi
from finfluence.integrations.transformers import InfluenceCallback

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
]


def lora(*, dropout: float = 0.1) -> Any:
    torch.manual_seed(1)
    inner = llama()
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(inner, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False))


CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "full, clipped, accumulated": (llama, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, 1e-4),
    "LoRA with dropout": (lora, {"max_grad_norm": 1.0}, 1e-4),
    "LoRA, bfloat16 autocast": (lora, {"bf16": True}, 5e-2),
    "LoRA, float16 with loss scaling": (lora, {"fp16": True}, 5e-2),
    "LoRA, fused AdamW": (lora, {"optim": "adamw_torch_fused"}, 1e-4),
}


@pytest.mark.parametrize("case", list(CASES))
def test_training_is_that_without_the_callback(tmp_path: Path, case: str) -> None:
    make, changes, limit = CASES[case]
    seen = []
    for recorded in (False, True):
        callbacks = [InfluenceCallback({"q": query_rows()}, tmp_path / "run", id_column="name")] if recorded else []
        model = make()
        options = {"use_cpu": False, "num_train_epochs": 1} | changes
        run = trainer(model, tmp_path / "out", callbacks=list(callbacks), data=rows(12), **options)
        run.train()
        assert next(model.parameters()).is_cuda
        seen.append((parameters(model).cpu(), torch.cuda.get_rng_state()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    steps = fi.open_run(tmp_path / "run").steps()
    residuals = steps.filter(~steps["skipped"])["residual"] if "skipped" in steps.columns else steps["residual"]
    assert residuals.len() > 0
    assert residuals.max() < limit  # pyright: ignore[reportOperatorIssue]
