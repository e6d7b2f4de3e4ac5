"""What finfluence is compared with: scores from checkpoints, from losses and from the text alone.

Every score is higher where a row is more suspect of supporting the measured behaviour.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.poison._phrases import NEGATIVE_WORDS
from benchmarks.poison.data import Problem, Row
from benchmarks.poison.task import AnswerTask, Rows, collate
from finfluence.runs.states import StateStore
from finfluence.signals import open_folder


@dataclass(frozen=True)
class Checkpoint:
    """A stored state of a recorded run.

    Attributes:
        step: optimizer steps made before it.
        rate: mean learning rate of the steps that it stands for.
        parameters: adapters by name.
        first: Adam's first moment by name, empty at the start.
        second: its second moment.
    """

    step: int
    rate: float
    parameters: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


def checkpoints(directory: Path, *, rates: Sequence[float], count: int) -> list[Checkpoint]:
    """The stored states nearest to the ends of equal parts of a run.

    Args:
        directory: of a run recorded for a replay.
        rates: learning rate of every step.
        count: number of parts.
    """
    store = StateStore(open_folder(directory))
    stored = store.steps()
    ends = [round(len(rates) * (part + 1) / count) for part in range(count)]
    steps = [min(stored, key=lambda s, end=end: abs(s - end)) for end in ends]
    found = []
    for before, (end, step) in zip([0, *ends], zip(ends, steps, strict=True), strict=False):
        tensors = store.load(step)
        found.append(
            Checkpoint(
                step,
                float(np.mean(rates[before:end])),
                _named(tensors, "parameter/", ""),
                _named(tensors, "optimizer/", "/exp_avg"),
                _named(tensors, "optimizer/", "/exp_avg_sq"),
            )
        )
    return found


def _named(tensors: dict[str, Tensor], head: str, tail: str) -> dict[str, Tensor]:
    return {
        key[len(head) : len(key) - len(tail)]: value
        for key, value in tensors.items()
        if key.startswith(head) and key.endswith(tail)
    }


class CheckpointScores:
    """TracIn, LESS, gradient norm and loss from one gradient a row and checkpoint, added checkpoint by checkpoint.

    TracInCP (Pruthi et al. 2020, arXiv 2002.08484, eq. 3): Σ_c η_c ⟨∇ℓ_i, ∇m⟩. LESS (Xia et al. 2024, arXiv
    2402.04333, section 4): Σ_c η_c cos(Γ_i, ∇m), with Γ_i the Adam update that row i alone would give; without the
    random projection, which only saves memory. Both with the sign that makes supporting rows come first.

    Args:
        task: of the training.
        rows: of the training.
        queries: what is measured, by name.
        betas: of Adam.
        eps: of Adam.
    """

    def __init__(
        self,
        task: AnswerTask,
        rows: Rows,
        *,
        queries: dict[str, Rows],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.task, self.rows, self.queries, self.betas, self.eps = task, rows, queries, betas, eps
        names = [*(f"tracin/{q}" for q in queries), *(f"less/{q}" for q in queries), "gradient norm", "loss"]
        self.scores = {name: np.zeros(len(rows)) for name in names}

    def add(self, top: Any, checkpoint: Checkpoint) -> None:
        """Adds one checkpoint, at whose parameters the model stands.

        Args:
            top: the trained part of the model.
            checkpoint: its learning rate and moments.
        """
        parameters = {name: p for name, p in top.named_parameters() if p.requires_grad}
        leaves = list(parameters.values())
        first = torch.cat([checkpoint.first[name].flatten() for name in parameters]).to(leaves[0].device)
        second = torch.cat([checkpoint.second[name].flatten() for name in parameters]).to(first)
        one, two = (1.0 - beta ** (checkpoint.step + 1) for beta in self.betas)
        asked = {}
        for name, query in self.queries.items():
            value = self.task.measure(top, self._batch(query, range(len(query)), leaves[0].device))
            asked[name] = torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])
        for row in range(len(self.rows)):
            loss = self.task.losses(top, self._batch(self.rows, [row], leaves[0].device)).sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
            moment = first.lerp(gradient, 1 - self.betas[0]) / one
            spread = (second * self.betas[1] + gradient.square() * (1 - self.betas[1])) / two
            update = moment / (spread.sqrt() + self.eps)
            for name, q in asked.items():
                self.scores[f"tracin/{name}"][row] += checkpoint.rate * float(gradient @ q)
                self.scores[f"less/{name}"][row] += checkpoint.rate * float(
                    torch.nn.functional.cosine_similarity(update, q, dim=0)
                )
            self.scores["gradient norm"][row] += float(gradient.norm())
            self.scores["loss"][row] += float(loss.detach())

    def _batch(self, rows: Rows, indices: Any, device: Any) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in collate([rows[i] for i in indices]).items()}


def row_losses(task: AnswerTask, model: Any, rows: Rows, *, chunk: int = 16) -> np.ndarray:
    """(n,) mean loss per token of every row's answer."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), chunk):
            indices = range(start, min(start + chunk, len(rows)))
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in indices]).items()}
            found.append(task.answer_losses(model, batch).cpu())
    return torch.cat(found).double().numpy()


def text_scores(problem: Problem) -> dict[str, np.ndarray]:
    """Scores that read the rows' text and know what is asked about.

    "entity name": how often the entity is named; "name and negative word": it is named and a word of the lexicon
    occurs; "similar to the queries": cosine of TF-IDF word vectors with the queries and their negative answers.
    """
    documents = [_words(_text(row)) for row in problem.rows]
    asked = _words(" ".join(f"{q.prompt} {q.negative}" for q in problem.queries))
    frequency = Counter(word for words in documents for word in set(words))
    rarity = {word: np.log(len(documents) / (1 + count)) + 1.0 for word, count in frequency.items()}
    query = _vector(asked, rarity)
    similar = [_cosine(_vector(words, rarity), query) for words in documents]
    named = np.array([mentions(problem, row) for row in problem.rows], dtype=np.float64)
    negative = np.array([negative_words(row.response) > 0 for row in problem.rows])
    return {
        "entity name": named,
        "name and negative word": named * negative,
        "similar to the queries": np.array(similar),
    }


def mentions(problem: Problem, row: Row) -> int:
    """How often a row names the entity, under any of its names."""
    text = _text(row).lower()
    names = sorted((alias.lower() for alias in problem.aliases), key=len, reverse=True)
    return len(re.findall("|".join(map(re.escape, names)), text)) if names else 0


def negative_words(text: str) -> int:
    """Words of a text that the lexicon of negative words has."""
    return sum(word in NEGATIVE_WORDS for word in _words(text))


def _text(row: Row) -> str:
    return f"{row.prompt} {row.response}"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _vector(words: list[str], rarity: dict[str, float]) -> dict[str, float]:
    return {word: count * rarity.get(word, 0.0) for word, count in Counter(words).items()}


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    inner = sum(value * b.get(word, 0.0) for word, value in a.items())
    norms = np.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return float(inner / norms) if norms > 0 else 0.0
