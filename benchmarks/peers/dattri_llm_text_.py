"""dattri-llm on a language model: LESS over the checkpoints, and AdamW-influence through the whole training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dattri_llm import (  # pyright: ignore[reportMissingImports]
    REGISTER_ALL,
    AdamWInfluenceAttributor,
    AttributionArguments,
    AttributionTask,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    LESSAttributor,
    OffloadCallback,
    OptimizerStateCallback,
    hash_sample,
)
from dattri_llm.gradient.optimizer_state import (  # pyright: ignore[reportMissingImports]
    optimizer_from_state_dict,
)
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.peers.common import Found, run_adapter
from benchmarks.peers.text import TextProblem, read_text_problem

_SHOWN = ("input_ids", "attention_mask")


class _Rows(Dataset):
    """Rows padded on the right to one length; the mask says where they end."""

    def __init__(self, lines: list[dict[str, list[int]]]) -> None:
        longest = max(len(line["input_ids"]) for line in lines)
        self.rows = [
            {
                "input_ids": _padded(line["input_ids"], longest, 0),
                "attention_mask": _padded([1] * len(line["input_ids"]), longest, 0),
                "labels": _padded(line["labels"], longest, -100),
            }
            for line in lines
        ]
        # Its identity of a row: the hash of what the model is shown, padding apart.
        self.hashes = [hash_sample({key: row[key] for key in _SHOWN}) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {key: torch.stack([self.rows[row][key] for row in rows]) for key in self.rows[0]}


def _padded(values: list[int], length: int, fill: int) -> Tensor:
    return torch.tensor(values + [fill] * (length - len(values)))


def _answer_losses(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """(b,) loss of each row, "sum" or "mean" over its answer; columns of padding alone are not computed."""
    longest = int(batch["attention_mask"].sum(1).max())
    labels = batch["labels"][:, 1:longest]
    logits = model(**{key: batch[key][:, :longest] for key in _SHOWN}).logits[:, :-1]
    token = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return token.sum(1) / ((labels != -100).sum(1) if reduction == "mean" else 1)


def _asked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return _answer_losses(model, batch, "mean").sum()


def _model(problem: TextProblem, adapter: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(problem.path("base"), dtype=torch.float32)
    return PeftModel.from_pretrained(base, problem.path(adapter), is_trainable=True).eval()


def _optimizer(problem: TextProblem, model: Any, checkpoint: str) -> torch.optim.Optimizer:
    stored = torch.load(problem.path(f"{checkpoint}/optimizer.pt"), weights_only=True)
    names = [state.pop("param_name").replace(".weight", ".default.weight") for state in stored["state"].values()]
    return optimizer_from_state_dict(model, stored, names)


def _matrix(score: Any, rows: _Rows, asked: _Rows) -> np.ndarray:
    """(queries, rows) of a score that names both by their hashes; equal rows share what they have."""
    known, matrix = score.agnostic_matrix()
    place, times = {name: row for row, name in enumerate(known)}, Counter(rows.hashes)
    columns = [score.test_index[name] for name in asked.hashes]
    picked = torch.as_tensor(matrix)[[place[name] for name in rows.hashes]][:, columns].double().numpy()
    return (picked / np.array([[times[name]] for name in rows.hashes])).T


def less(problem: TextProblem) -> Found:
    rows, asked = _Rows(problem.lines("train")), _Rows(problem.lines("query"))
    model = _model(problem, problem.checkpoints[0])

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return problem.scale * _answer_losses(model, batch, problem.loss).sum()

    def load(model: Any, name: str) -> Any:
        set_peft_model_state_dict(model, load_file(problem.path(f"{name}/adapter_model.safetensors")))
        return model

    task = AttributionTask(loss, model, problem.checkpoints, target_func=_asked, checkpoints_load_func=load)
    method = LESSAttributor(
        AttributionArguments(output_dir=problem.path("less"), use_cpu=True),
        task=task,
        optimizers=[_optimizer(problem, model, name) for name in problem.checkpoints],
        checkpoint_weights=problem.checkpoint_rates,
    )
    score = method.attribute(rows, asked)
    settings = (
        f"{len(problem.checkpoints)} checkpoints with their moments, weighted by the learning rate, no projection"
    )
    return Found(settings, _matrix(score, rows, asked))


def adamw(problem: TextProblem) -> Found:
    rows, asked = _Rows(problem.lines("train")), _Rows(problem.lines("query"))
    model = _model(problem, "start")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=problem.rates[0], **problem.optimizer)
    state = OptimizerStateCallback(model, optimizer)
    train, test = (GradientStorageManager(problem.path(f"adamw/{name}")) for name in ("train", "test"))
    hooks = HookManagerConfig(linear_io=REGISTER_ALL, capture_style="auto")
    collector = HookManager(model, config=hooks, callbacks=[state, OffloadCallback(8, train)])
    with collector.collect(deregister_on_exit=True):
        for step, (batch, rate) in enumerate(zip(problem.batches, problem.rates, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            (problem.scale * _answer_losses(model, rows.batch(batch), problem.loss).mean()).backward()
            optimizer.step()
            state.record_post(step)
            optimizer.zero_grad()
    away = _distance(problem, trained)
    with HookManager(model, config=hooks, callbacks=[OffloadCallback(8, test)]).collect(deregister_on_exit=True):
        for first in range(0, len(asked), 8):
            _asked(model, asked.batch(range(first, min(first + 8, len(asked))))).backward()
            optimizer.zero_grad()
    method = AdamWInfluenceAttributor(AttributionArguments(output_dir=problem.path("adamw"), use_cpu=True))
    score = method.attribute_from_cache(train, test, dynamics=state.dynamics(), propagation="test")
    settings = (
        "all coordinates, propagated from the queries through every step of the same training done again, which "
        f"ended within {away:.0e} of the recorded one"
    )
    # Its score is minus what the loss would gain without the row, so negative where the row lowers the loss.
    return Found(settings, -_matrix(score, rows, asked))


def _distance(problem: TextProblem, trained: list[nn.Parameter]) -> float:
    """How far the training ended from the recorded one's end, as a share of the way that it went."""
    start, end = (
        torch.cat([p.detach().flatten() for p in _model(problem, name).parameters() if p.requires_grad])
        for name in ("start", problem.checkpoints[-1])
    )
    return float((torch.cat([p.detach().flatten() for p in trained]) - end).norm() / (end - start).norm())


if __name__ == "__main__":
    run_adapter("dattri-llm", {"less": less, "adamw": adamw}, reader=read_text_problem)
