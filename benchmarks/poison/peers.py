"""Peers that take language models, run from their own packages on the experiment's trainings.

They are given the adapted top as a causal language model of its own, in Hugging Face's formats: the embedding of its
token p is what the trunk makes of the p-th position of the data, so that its gradients by the adapters are those of the
whole model, and peers are spared the frozen layers as every other method here is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._peers import Peer, python_of, run_peer
from benchmarks.poison.baselines import Checkpoint
from benchmarks.poison.model import AdaptedModel
from benchmarks.poison.task import Rows
from finfluence.errors import InputError

PEERS = (
    Peer("bergson EK-FAC", "bergson", "bergson_", "ekfac"),
    Peer("bergson TrackStar", "bergson", "bergson_", "trackstar"),
    Peer("dattri-llm LESS", "dattri-llm", "dattri_llm_text_", "less"),
    Peer("dattri-llm AdamW-influence", "dattri-llm", "dattri_llm_text_", "adamw"),
)


@dataclass(frozen=True)
class Recorded:
    """A training as peers are told of it.

    Attributes:
        start: adapters before the first step, by name.
        checkpoints: stored states; the last one is where the training ended.
        batches: rows of every step, in order.
        rates: learning rate of every step.
        optimizer: betas, eps and weight_decay of AdamW.
        loss: "sum" over an answer's tokens or their "mean", as rows were trained on.
        scale: of the rows' losses in training.
    """

    start: Mapping[str, Tensor]
    checkpoints: Sequence[Checkpoint]
    batches: Sequence[Sequence[int]]
    rates: Sequence[float]
    optimizer: Mapping[str, Any]
    loss: str
    scale: float


class Positions:
    """Data as positions: rows with equal beginnings share theirs.

    Attributes:
        hidden: what the trunk makes of each position.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], int] = {}
        self.hidden: list[Tensor] = []

    def lines(self, rows: Rows) -> list[dict[str, list[int]]]:
        """One mapping a row: input_ids (t,) positions; labels (t,) the row's tokens, −100 before the answer."""
        found = []
        for encoded, states in zip(rows.encoded, rows.hidden, strict=True):
            places = []
            for end in range(1, len(encoded.tokens) + 1):
                place = self._known.setdefault(tuple(encoded.tokens[:end]), len(self.hidden))
                if place == len(self.hidden):
                    self.hidden.append(states[end - 1])
                places.append(place)
            asked = len(encoded.tokens) - encoded.answer
            found.append({"input_ids": places, "labels": [-100] * asked + encoded.tokens[asked:]})
        return found


def write_problem(
    folder: Path, adapted: AdaptedModel, tokenizer: Any, *, rows: Rows, asked: Rows, training: Recorded
) -> None:
    """Writes what adapters of language peers read, see `benchmarks.peers.text`.

    Args:
        folder: to write into.
        adapted: the model; where its adapters stand does not matter.
        tokenizer: kept beside the model, for peers that insist on one.
        rows: of the training.
        asked: rows whose losses are measured.
        training: the training that is scored.

    Raises:
        InputError: the data has more positions than the vocabulary has tokens.
    """
    positions = Positions()
    for name, part in (("train", rows), ("query", asked)):
        lines = "".join(json.dumps(line) + "\n" for line in positions.lines(part))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    base = (folder / "base").absolute()
    _write_top(base, adapted, positions)
    tokenizer.save_pretrained(base)
    names = []
    for number, checkpoint in enumerate(training.checkpoints):
        names.append(f"checkpoint-{number}")
        _write_adapter(folder / names[-1], base, adapted, checkpoint.parameters)
        torch.save(_optimizer_state(checkpoint, training), folder / names[-1] / "optimizer.pt")
    _write_adapter(folder / "start", base, adapted, training.start)
    described = {
        "checkpoints": names,
        "checkpoint_rates": [checkpoint.rate for checkpoint in training.checkpoints],
        "batches": [list(map(int, batch)) for batch in training.batches],
        "rates": list(training.rates),
        "optimizer": dict(training.optimizer),
        "loss": training.loss,
        "scale": training.scale,
    }
    (folder / "problem.json").write_text(json.dumps(described) + "\n", encoding="utf-8")


def _write_top(base: Path, adapted: AdaptedModel, positions: Positions) -> None:
    """The top as a Llama with embeddings and a head of its own."""
    from safetensors.torch import save_file

    head = adapted.head.cpu()
    if len(positions.hidden) > len(head):
        raise InputError(
            f"the data has {len(positions.hidden)} positions, the vocabulary {len(head)} tokens; take fewer or "
            "shorter rows, or leave out --peers"
        )
    embedded = torch.zeros_like(head)
    embedded[: len(positions.hidden)] = torch.stack(positions.hidden).to(embedded)
    state = {
        f"model.{name.replace('.base_layer', '')}": tensor.detach().cpu().contiguous()
        for name, tensor in adapted.top.state_dict().items()
        if "lora_" not in name
    }
    used: Any = adapted.top.config
    config = type(used).from_dict(used.to_dict())
    config.tie_word_embeddings, config.architectures = False, ["LlamaForCausalLM"]
    config.save_pretrained(base)
    tensors = {**state, "model.embed_tokens.weight": embedded, "lm_head.weight": head.clone()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _write_adapter(folder: Path, base: Path, adapted: AdaptedModel, parameters: Mapping[str, Tensor]) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    used = adapted.whole.peft_config["default"]
    config = LoraConfig(
        r=used.r,
        lora_alpha=used.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(used.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    config.save_pretrained(str(folder))
    tensors = {_peft_name(name): tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _peft_name(name: str) -> str:
    """A parameter of the top, as PEFT stores it."""
    return f"base_model.model.model.{name.replace('.default', '')}"


def _optimizer_state(checkpoint: Checkpoint, training: Recorded) -> dict[str, Any]:
    """The checkpoint's moments as `torch.optim.AdamW` stores them, with names beside the numbers."""
    names = [name for name in checkpoint.parameters if name in checkpoint.second]
    state = {
        number: {
            "step": torch.tensor(float(checkpoint.step)),
            "exp_avg": checkpoint.first[name],
            "exp_avg_sq": checkpoint.second[name],
            "param_name": _peft_name(name),
        }
        for number, name in enumerate(names)
    }
    group = {"params": list(range(len(names))), "lr": checkpoint.rate, **training.optimizer}
    return {"state": state, "param_groups": [group]}


def weights(queries: Mapping[str, Rows]) -> tuple[Rows, np.ndarray]:
    """Every asked row once, and what each query makes of the rows' losses.

    Returns:
        The rows, and (queries, rows) weights: a query is the weighted sum of the rows' losses per token.
    """
    largest = max(queries.values(), key=len)
    place = {tuple(encoded.tokens): row for row, encoded in enumerate(largest.encoded)}
    found = np.zeros((len(queries), len(largest)))
    for number, rows in enumerate(queries.values()):
        share = 1.0 / sum(sign > 0 for sign in rows.signs)
        for encoded, sign in zip(rows.encoded, rows.signs, strict=True):
            found[number, place[tuple(encoded.tokens)]] += sign * share
    return largest, found


def waiting(found: Mapping[str, Any], folder: Path | None, *, only: Sequence[str] | None = None) -> list[Peer]:
    """Peers that have an environment and no scores yet; what failed before is tried again.

    Args:
        found: results of `peer_result` by name.
        folder: of the environments, or None.
        only: names of the peers to run; all by default.
    """
    return [
        peer
        for peer in PEERS
        if (only is None or peer.name in only)
        and python_of(folder, peer.environment) is not None
        and "scores" not in found.get(peer.name, {})
    ]


def peer_result(
    peer: Peer, problem: Path, *, queries: Sequence[str], matrix: np.ndarray, folder: Path | None
) -> dict[str, Any]:
    """Runs one peer.

    Args:
        peer: one of `PEERS`.
        problem: folder that `write_problem` wrote.
        queries: their names.
        matrix: (queries, rows) weights, see `weights`.
        folder: of the environments.

    Returns:
        {"scores": {query: (n,) list, higher where a row supports it}, "about": what the adapter says of its run}, or
        {"failure": why there are none}.
    """
    found = run_peer(peer, problem, folder=folder, timeout=7200)
    if isinstance(found, str):
        return {"failure": found}
    if found.scores is None or not np.isfinite(found.scores).all():
        return {"failure": "no finite scores"}
    combined = matrix @ found.scores
    return {"scores": dict(zip(queries, combined.tolist(), strict=True)), "about": found.about}


def about_peers(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """What a record says of peers beside their rows.

    Args:
        results: of all trainings.

    Returns:
        Versions by package, and sentences: how each peer was set and what it needed, or why it has no scores.
    """
    versions: dict[str, str] = {}
    notes = []
    for peer in PEERS:
        found = [result["peers"][peer.name] for result in results if peer.name in result.get("peers", {})]
        ran = [entry["about"] for entry in found if "about" in entry]
        versions |= {about["package"]: about["version"] for about in ran}
        if ran:
            settings = sorted({about["settings"] for about in ran})
            peak = max(about["peak_mb"] for about in ran) / 1e3
            notes.append(f"{peer.name} {ran[0]['version']}: {'; or '.join(settings)}; at most {peak:.1f} GB of memory.")
        reasons = sorted({entry["failure"] for entry in found if "failure" in entry})
        if reasons:
            notes.append(f"{peer.name}, without scores in {len(found) - len(ran)} trainings: {'; '.join(reasons)}.")
    return versions, notes
