"""What a replay costs beside the training that it replays: time, and memory in a process of its own.

Time: the recorded training's loop and its replay, alternating in one process, median over repetitions. Memory: growth
of the process's resident set, sampled every few milliseconds, in a fresh process each for the bare training and for
the recorded and replayed one.

    OMP_NUM_THREADS=1 python -m benchmarks replay_cost
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finfluence as fi
from benchmarks._records import Record, parser
from finfluence.runs import NoisePanel, ReplayOptions, plan_replay
from finfluence.runs.engine import Engine
from finfluence.runs.plan import Plan
from finfluence.sensitivity import HessianMethod
from finfluence.workflows.digits import digits

CASES = {
    "digits": "MLP 64-32-10, batch 20, 500 steps",
    "large": "MLP 784-1024-1024-10, batch 256, 36 steps",
    "large-adamw": "MLP 784-1024-1024-10, batch 256, 36 steps, AdamW",
}


class Problem:
    """One training of a case."""

    def __init__(self, case: str, queries: int) -> None:
        if case == "digits":
            recipe = digits(samples=500)
            self.make, self.data, plan = lambda: recipe.make_model(0), recipe.dataset, recipe.plan
            inputs, targets = recipe.queries["validation"].tensors
            self.settings = {"optimizer": plan.optimizer, "epochs": plan.epochs, "batch_size": plan.batch_size}
        else:
            generator = torch.Generator().manual_seed(0)
            self.data = TensorDataset(
                torch.randn(12 * 256, 784, generator=generator),
                torch.randint(0, 10, (12 * 256,), generator=generator),
            )
            inputs, targets = (t[:200] for t in self.data.tensors)
            self.make = _large
            optimizer = fi.SGD(lr=0.05) if case == "large" else fi.AdamW(lr=3e-5)
            self.settings = {"optimizer": optimizer, "epochs": 3, "batch_size": 256}
        if queries == 1:
            self.queries: dict[str, Any] = {"validation": (inputs, targets)}
        else:
            self.queries = {f"q{k}": (inputs[k : k + 1], targets[k : k + 1]) for k in range(queries)}

    def run(self, directory: Path, options: ReplayOptions, panel: NoisePanel) -> tuple[fi.Run, float]:
        """The recorded and replayed run, and the seconds of the whole call after the training's loop."""
        began = time.perf_counter()
        run = fi.train(
            fi.ClassificationTask(),
            self.make(),
            self.data,
            queries=self.queries,
            directory=directory,
            sensitivity="replay",
            replay_options=options,
            panel=panel,
            show_progress="never",
            **self.settings,
        )
        return run, time.perf_counter() - began - run.manifest["training_seconds"]

    def bare(self) -> None:
        """The training alone: no recording, no states."""
        plan = Plan(seed=0, **self.settings)
        engine = Engine(fi.ClassificationTask(), self.make(), dataset=self.data, plan=plan)
        for batch in engine.batches():
            engine.step(batch)


def _large() -> nn.Module:
    torch.manual_seed(0)
    widths = [784, 1024, 1024, 10]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def times(case: str, queries: int, options: ReplayOptions, panel: NoisePanel, *, repetitions: int) -> dict[str, Any]:
    """Median seconds of the training's loop and of the replay."""
    problem = Problem(case, queries)
    rows: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(repetitions + 1):
            run, seconds = problem.run(Path(folder) / str(repetition), options, panel)
            rows.append((run.manifest["training_seconds"], seconds))
        plan = plan_replay(Path(folder) / "0", problem.make(), options=options)
    training, replay = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    ratio = statistics.median(b / a for a, b in rows[1:])
    return {"training": training, "replay": replay, "ratio": ratio, "planned": plan.seconds, "hessian": plan.hessian}


def growth(work: Callable[[], Any]) -> int:
    """Bytes by which the resident set grows at most while `work` runs."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    base = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(peak, base) - base


def measure_memory(case: str, what: str, memory_bytes: int | None) -> None:
    """In a fresh process: prints base and growth as JSON."""
    problem = Problem(case, 1)
    options = ReplayOptions(memory_bytes=memory_bytes)
    with tempfile.TemporaryDirectory() as folder:
        # The optimizer's and polars' first use import and allocate what has nothing to do with either.
        tiny = Problem("digits", 1)
        tiny.settings |= {"epochs": 1}
        tiny.run(Path(folder) / "warm", options, NoisePanel(4, 2))
        base = psutil.Process().memory_info().rss
        if what == "training":
            found = growth(problem.bare)
        else:
            found = growth(lambda: problem.run(Path(folder) / "run", options, NoisePanel()))
    print(json.dumps({"base": base, "growth": found}))


def memory(case: str, what: str, memory_bytes: int | None = None) -> dict[str, float]:
    """Megabytes of a fresh process before and of its growth during a training or a recorded, replayed one."""
    command = [sys.executable, "-m", "benchmarks.replay_cost", "--measure", case, what]
    if memory_bytes is not None:
        command += ["--memory-bytes", str(memory_bytes)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: value / 1e6 for key, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--measure", nargs=2, metavar=("CASE", "WHAT"), help="for the benchmark's own processes")
    made.add_argument("--memory-bytes", type=int, default=None, help="for the benchmark's own processes")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.measure:
        case, what = options.measure
        measure_memory(case, what, options.memory_bytes)
        return
    wanted: list[tuple[str, int, HessianMethod]] = [
        ("digits", 1, "exact"),
        ("digits", 40, "exact"),
        ("large", 1, "one-sided"),
        ("large", 1, "exact"),
        ("large-adamw", 1, "auto"),
    ]
    panels = (NoisePanel(), NoisePanel(0))
    if options.quick:
        wanted, panels, options.repetitions, options.cases = wanted[:1], panels[:1], 1, ["digits"]
    record = Record("replay_cost", options, seeds=0)
    rows: list[dict[str, Any]] = []
    for case, queries, method in wanted:
        if case not in options.cases:
            continue
        for panel in panels:
            replay = ReplayOptions(hessian=method)
            found = times(case, queries, replay, panel, repetitions=options.repetitions)
            rows.append(found | {"case": CASES[case], "queries": queries, "panel": f"{panel.samples} samples"})
    record.table(
        f"Time, medians of {options.repetitions} repetitions",
        {
            "case": "training",
            "queries": "queries",
            "hessian": "Hessian products",
            "panel": "panel",
            "training": "training, s|.2f",
            "replay": "replay, s|.2f",
            "ratio": "ratio|.2f",
            "planned": "planned, s|.1f",
        },
        rows,
    )
    for case in [case for case in options.cases if case.startswith("large")]:
        training = memory(case, "training")
        whole = training["base"] + training["growth"]
        rows = [
            {"what": name, **found, "ratio": (found["base"] + found["growth"]) / whole}
            for name, found in (
                ("training alone", training),
                ("recorded and replayed", memory(case, "replay")),
                ("recorded and replayed, segments in a file", memory(case, "replay", 0)),
            )
        ]
        record.table(
            f"Memory: {CASES[case]}",
            {
                "what": "what",
                "base": "process before, MB|.0f",
                "growth": "growth, MB|.0f",
                "ratio": "whole process against training|.2f",
            },
            rows,
        )


if __name__ == "__main__":
    main()
