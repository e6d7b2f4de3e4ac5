"""What recording costs: step time and peak memory of a recorded loop over the plain one, in one interleaved run.

    python -m benchmarks overhead                  # both models on the CPU
    python -m benchmarks overhead --device cuda    # on a GPU
    python -m benchmarks overhead --quick

Step times alternate plain and recorded steps, so that both meet the same machine; ratios are medians over rounds. Peak
memory is that of separate processes, one plain and one recorded, with the same libraries loaded.
"""

from __future__ import annotations

import importlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import finfluence as fi
from benchmarks._llama import Llama
from benchmarks._records import Record, command, parser

Step = Callable[[int], None]


class Mlp:
    """784-1024-1024-10, batch 256, one query of 64 samples."""

    batch, query_size = 256, 64

    def __init__(self, device: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        ).to(device)
        self.x = torch.randn(self.batch, 784, device=device)
        self.y = torch.randint(10, (self.batch,), device=device)
        self.qx = torch.randn(self.query_size, 784, device=device)
        self.qy = torch.randint(10, (self.query_size,), device=device)
        self.optimizer = make_optimizer(optimizer, self.model)

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x), self.y)

    def query(self, model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(self.qx), self.qy)


class LlamaLora:
    """Six Llama blocks with LoRA r=8, batch 8 × 128 tokens, one query of 2 × 128 tokens."""

    batch, query_size = 8, 2

    def __init__(self, device: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = Llama().to(device)
        self.ids = torch.randint(4096, (self.batch, 128), device=device)
        self.query_ids = torch.randint(4096, (self.query_size, 128), device=device)
        self.optimizer = make_optimizer(optimizer, self.model)

    def loss(self) -> Tensor:
        return language_loss(self.model, self.ids)

    def query(self, model: nn.Module) -> Tensor:
        return language_loss(model, self.query_ids)


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.01) if name == "sgd" else torch.optim.AdamW(parameters, lr=1e-4)


WORKLOADS: dict[str, type[Any]] = {"mlp": Mlp, "llama-lora": LlamaLora}
# workload, optimizer, refresh: the rows of the table and what was aimed at
ROWS = [
    ("mlp", "adamw", 1, 1.75),
    ("mlp", "adamw", 8, 1.5),
    ("mlp", "sgd", 1, 1.4),
    ("mlp", "sgd", 8, 1.15),
    ("llama-lora", "adamw", 1, 1.4),
    ("llama-lora", "adamw", 8, 1.1),
]
WORKLOADS_KEPT = [("mlp", "adamw"), ("mlp", "sgd"), ("llama-lora", "adamw")]


def plain_step(work: Any) -> None:
    work.loss().backward()
    work.optimizer.step()
    work.optimizer.zero_grad()


def recorded_step(work: Any, recorder: Any, number: int) -> None:
    ids = torch.arange(work.batch) + work.batch * number
    with recorder.batch(ids):
        work.loss().backward()
    work.optimizer.step()
    work.optimizer.zero_grad()


def timed(action: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(
    name: str, optimizer: str, refresh: int, *, device: str, rounds: int, sensitivity: Any = "live"
) -> tuple[float, float]:
    """Median over rounds of (recorded / plain) step time, a round being 8 steps of each; and the plain step in ms.

    Of a training that is kept for a replay the ratio of all rounds together, as only some of them store a state.
    """
    plain, recorded = WORKLOADS[name](device, optimizer), WORKLOADS[name](device, optimizer)
    ratios, plain_times, recorded_times = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        recorder = fi.Recorder(
            recorded.model,
            recorded.optimizer,
            queries={"query": recorded.query},
            directory=Path(scratch) / "run",
            refresh=refresh,
            sensitivity=sensitivity,
        )
        number = 0
        with recorder:
            for k in range(rounds + 1):
                a = b = 0.0
                for _ in range(8):
                    a += timed(lambda: plain_step(plain), device)
                    b += timed(lambda n=number: recorded_step(recorded, recorder, n), device)
                    number += 1
                if k:  # the first round warms up
                    ratios.append(b / a)
                    plain_times.append(a / 8 * 1e3)
                    recorded_times.append(b / 8 * 1e3)
    if sensitivity == "live":
        return statistics.median(ratios), statistics.median(plain_times)
    return sum(recorded_times) / sum(plain_times), statistics.median(plain_times)


def peak_memory(name: str, optimizer: str, mode: str, device: str) -> float:
    """Peak of a fresh process in MB: resident memory on the CPU, allocated memory on a GPU."""
    words = [sys.executable, "-m", "benchmarks.overhead", "--peak", name, optimizer, mode, "--device", device]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def resident_peak() -> float:
    """Peak resident memory of this process in bytes; `ru_maxrss` would start from the parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text(encoding="ascii").splitlines() if row.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def report_peak(name: str, optimizer: str, mode: str, device: str) -> None:
    # Both modes load the same libraries (polars and pyarrow among them): what recording itself adds is in question.
    importlib.import_module("finfluence.runs.recorder")
    importlib.import_module("pyarrow.parquet")
    work = WORKLOADS[name](device, optimizer)
    steps = 9
    if mode == "plain":
        for _ in range(steps):
            plain_step(work)
    else:
        with (
            tempfile.TemporaryDirectory() as scratch,
            fi.Recorder(
                work.model, work.optimizer, queries={"query": work.query}, directory=Path(scratch) / "run"
            ) as recorder,
        ):
            for k in range(steps):
                recorded_step(work, recorder, k)
    if device == "cpu":
        print(resident_peak() / 1e6)
    else:
        print(torch.cuda.max_memory_allocated() / 1e6)


def import_seconds(module: str) -> float:
    """Best of five fresh interpreters, without the interpreter's own start."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cpu")
    made.add_argument("--rounds", type=int, default=12)
    made.add_argument(
        "--peak", nargs=3, metavar=("WORKLOAD", "OPTIMIZER", "MODE"), help="for the benchmark's own processes"
    )
    options = made.parse_args(arguments)
    if options.peak:
        name, optimizer, mode = options.peak
        report_peak(name, optimizer, mode, options.device)
        return
    rounds = 1 if options.quick else options.rounds
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    record = Record("overhead" if options.device == "cpu" else "overhead-gpu", options, seeds=0)
    record.content["command"] = command("overhead", options)
    rows: list[dict[str, Any]] = []
    for name, optimizer, refresh, aim in ROWS[:1] if options.quick else ROWS:
        found, plain = ratio(name, optimizer, refresh, device=options.device, rounds=rounds)
        every = "every step" if refresh == 1 else f"every {refresh} steps"
        rows.append(
            {"workload": name, "optimizer": optimizer, "refresh": every, "ratio": found, "aim": aim, "plain": plain}
        )
    record.table(
        f"Step time, medians of {rounds} rounds of 8 steps ({where})",
        {
            "workload": "workload",
            "optimizer": "optimizer",
            "refresh": "query refreshed",
            "ratio": "recorded / plain step|.2f",
            "aim": "aim, at most",
            "plain": "plain step, ms|.1f",
        },
        rows,
    )
    kept = []
    for name, optimizer in WORKLOADS_KEPT[:1] if options.quick else WORKLOADS_KEPT:
        found, plain = ratio(name, optimizer, 1, device=options.device, rounds=rounds, sensitivity="replay")
        kept.append({"workload": name, "optimizer": optimizer, "ratio": found, "plain": plain})
    record.table(
        f"Kept for a replay, without live signals: {rounds} rounds of 8 steps, a state every 32 steps ({where})",
        {
            "workload": "workload",
            "optimizer": "optimizer",
            "ratio": "recorded / plain step|.2f",
            "plain": "plain step, ms|.1f",
        },
        kept,
    )
    if options.quick:
        return
    rows = []
    for name, optimizer in WORKLOADS_KEPT:
        a, b = (peak_memory(name, optimizer, mode, options.device) for mode in ("plain", "recorded"))
        rows.append({"workload": name, "optimizer": optimizer, "plain": a, "recorded": b, "ratio": b / a, "aim": 1.2})
    record.table(
        "Peak memory",
        {
            "workload": "workload",
            "optimizer": "optimizer",
            "plain": "plain, MB|.0f",
            "recorded": "recorded, MB|.0f",
            "ratio": "ratio|.2f",
            "aim": "aim, at most",
        },
        rows,
    )
    record.table(
        "Import",
        {"module": "module", "seconds": "seconds|.3f", "aim": "aim, at most"},
        [{"module": "finfluence", "seconds": import_seconds("finfluence"), "aim": 0.5}],
    )


if __name__ == "__main__":
    main()
