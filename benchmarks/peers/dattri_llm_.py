"""dattri-llm: TracIn over the checkpoints, gradients captured by its hooks."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from dattri_llm import AttributionArguments, AttributionTask, TracInAttributor  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from benchmarks.peers.common import Found, Problem, run_adapter


class _Rows(Dataset):
    """Samples as dictionaries, which its streamer expects."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.x, self.y = tensors

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "labels": self.y[row]}


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["labels"])


def tracin(problem: Problem) -> Found:
    total = np.zeros((len(problem.queries), len(problem.train)))
    for state, rate in zip(problem.checkpoints, problem.rates, strict=True):
        model = problem.model
        model.load_state_dict(state)
        with tempfile.TemporaryDirectory() as folder:
            task = AttributionTask(loss_func=_loss, model=model)
            method = TracInAttributor(AttributionArguments(output_dir=folder), task=task)
            score = method.attribute(_Rows(problem.train.tensors), _Rows(problem.queries.tensors))
            _, matrix = score.agnostic_matrix()
        total += rate * torch.as_tensor(matrix).numpy().T
    return Found(f"{len(problem.checkpoints)} checkpoints, weighted by the learning rate", total)


if __name__ == "__main__":
    run_adapter("dattri-llm", {"tracin": tracin})
