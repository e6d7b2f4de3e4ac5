"""What adapters of language peers read: a folder in Hugging Face's formats, written by `benchmarks.poison.peers`.

`base/` is a causal language model, `start/` and `checkpoint-K/` PEFT adapters of it, the latter with `optimizer.pt`;
`train.jsonl` and `query.jsonl` hold {"input_ids", "labels"}, labels −100 where no loss is taken. An adapter scores each
query row by itself: (queries, rows), positive where training on the row lowers the query row's mean loss per token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class TextProblem:
    """A training of a language model.

    Attributes:
        folder: of the problem.
        checkpoints: names of the adapters' folders in it; the last is where training ended.
        checkpoint_rates: mean learning rate of the steps that each checkpoint stands for.
        batches: rows of every step.
        rates: learning rate of every step.
        optimizer: betas, eps and weight_decay of AdamW.
        loss: "sum" or "mean" over a row's answer.
        scale: of that in training; a batch's loss is the mean over its rows.
    """

    folder: Path
    checkpoints: list[str]
    checkpoint_rates: list[float]
    batches: list[list[int]]
    rates: list[float]
    optimizer: dict[str, Any]
    loss: str
    scale: float

    def lines(self, name: str) -> list[dict[str, list[int]]]:
        """The rows of "train" or "query"."""
        text = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def path(self, name: str) -> str:
        """An absolute path in the folder."""
        return str((self.folder / name).absolute())


def read_text_problem(path: str) -> TextProblem:
    """Reads the folder's description."""
    folder = Path(path)
    return TextProblem(folder, **json.loads((folder / "problem.json").read_text(encoding="utf-8")))
