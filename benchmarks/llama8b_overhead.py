"""What recording costs at the shape of Llama-3.1-8B: step time and peak memory, with and without recording.

    python -m benchmarks llama8b_overhead --device cuda    # 8 billion random weights in bfloat16, LoRA r = 16
    python -m benchmarks llama8b_overhead --tiny           # the same code with a model of a few thousand weights

Weights are random, so nothing is downloaded: time and memory do not depend on their values. Plain and recorded steps
alternate in one process, on one model; ratios are medians over rounds of eight steps, one of which refreshes the query
(two rows as long as the batch's). A recorder's first step, which finds out where the samples lie in each layer, is not
timed. Peak memory is what the GPU allocated; on the CPU it is not measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finfluence as fi
from benchmarks._records import Record, parser

REFRESH = 8
# https://huggingface.co/meta-llama/Llama-3.1-8B: config.json
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
AIM = 1.1


def make_model(shape: dict[str, Any], device: str, *, checkpointing: bool) -> nn.Module:
    """A Llama with random bfloat16 weights, made where it is used, and a LoRA adapter on every linear map."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = shape | {"max_position_embeddings": 131072, "rope_scaling": dict(ROPE), "tie_word_embeddings": False}
    config = LlamaConfig(**options)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would make the other half's gradient zero
            nn.init.normal_(p, std=0.01)
    adapted.train()
    return adapted


class Work:
    """One model, its optimizer, a batch and a query of two rows."""

    def __init__(self, shape: dict[str, Any], device: str, *, checkpointing: bool) -> None:
        self.device, self.vocabulary = device, shape["vocab_size"]
        self.model = make_model(shape, device, checkpointing=checkpointing)
        self.task = fi.CausalLMTask()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def draw(self, batch: int, tokens: int) -> None:
        """Makes a batch and a query of random tokens."""
        generator = torch.Generator().manual_seed(1)
        self.rows = batch
        self.batch, self.query_batch = (
            {"input_ids": torch.randint(self.vocabulary, (rows, tokens), generator=generator).to(self.device)}
            for rows in (batch, 2)
        )

    def query(self, model: nn.Module) -> Tensor:
        """() mean loss of the query."""
        return self.task.measure(model, self.query_batch)

    def backward(self) -> None:
        """A forward and a backward pass over the batch."""
        self.task.losses(self.model, self.batch).mean().backward()

    def finish(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Times of plain and recorded steps, and the peak memory of each."""
    plain, recorded = [], []
    peaks = {"plain": 0.0, "recorded": 0.0}
    number, residual = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for k in range(rounds + 1):
            a = _timed(work, "plain", peaks, lambda: _plain(work))
            recorder = fi.Recorder(
                work.model,
                work.optimizer,
                queries={"query": work.query},
                directory=Path(scratch) / f"run-{k}",
                refresh=REFRESH,
            )
            with recorder:
                _recorded(work, recorder, number, steps=1)
                b = _timed(work, "recorded", peaks, lambda n=number + 1, r=recorder: _recorded(work, r, n))
            number, residual = number + 1 + REFRESH, max(residual, recorder.largest_residual)
            if k:  # the first round warms up
                plain.append(a / REFRESH)
                recorded.append(b / REFRESH)
    ratio = statistics.median(b / a for a, b in zip(plain, recorded, strict=True))
    return {
        "plain_seconds": statistics.median(plain),
        "recorded_seconds": statistics.median(recorded),
        "time_ratio": ratio,
        "plain_peak_gb": peaks["plain"] / 1e9,
        "recorded_peak_gb": peaks["recorded"] / 1e9,
        "memory_ratio": peaks["recorded"] / peaks["plain"] if peaks["plain"] else None,
        "residual": residual,
    }


def _plain(work: Work) -> None:
    for _ in range(REFRESH):
        work.backward()
        work.finish()


def _recorded(work: Work, recorder: Any, number: int, *, steps: int = REFRESH) -> None:
    for k in range(steps):
        ids = torch.arange(work.rows) + work.rows * (number + k)
        with recorder.batch(ids):
            work.backward()
        work.finish()


def _timed(work: Work, kind: str, peaks: dict[str, float], action: Callable[[], None]) -> float:
    cuda = work.device != "cpu"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize()
        peaks[kind] = max(peaks[kind], float(torch.cuda.max_memory_allocated()))
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try the path")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--shapes", nargs="+", default=["4x512", "8x1024"], help="rows x tokens of a batch")
    made.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    options = made.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        made.error("8 billion weights need a GPU with 40 GB (--device cuda); --tiny tries the path on a CPU")
    options.quick = options.quick or options.tiny
    record = Record("llama8b_overhead", options, seeds=0, merge=True)
    work = Work(TINY if options.tiny else SHAPE, options.device, checkpointing=options.checkpointing)
    for text in ["4x32"] if options.tiny else options.shapes:
        batch, tokens = map(int, text.split("x"))
        work.draw(batch, tokens)
        _report(
            record,
            options,
            size=sum(p.numel() for p in work.model.parameters()),
            shape=f"{batch} × {tokens}",
            found=measure(work, options.rounds),
        )
    if options.tiny:
        print("The tiny model shows that the path works; its ratio says nothing about 8 billion weights.")


def _report(record: Record, options: Any, *, size: int, shape: str, found: dict[str, Any]) -> None:
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    how = ", activations recomputed" if options.checkpointing else ""
    kinds = [("step, ms", "seconds", "time_ratio", 1e3), ("peak memory, GB", "peak_gb", "memory_ratio", 1.0)]
    record.table(
        f"{size:,} parameters, batch {shape} tokens{how} ({where})",
        {
            "measure": f"query refreshed every {REFRESH} steps",
            "plain": "plain|.2f",
            "recorded": "recorded|.2f",
            "ratio": "ratio|.3f",
            "aim": "aim, at most",
            "residual": "residual of the identity|.0e",
        },
        [
            {
                "measure": name,
                "plain": found[f"plain_{key}"] * unit,
                "recorded": found[f"recorded_{key}"] * unit,
                "ratio": found[ratio],
                "aim": AIM,
                "residual": found["residual"],
            }
            for name, key, ratio, unit in kinds
            if found[ratio] is not None
        ],
    )


if __name__ == "__main__":
    main()
