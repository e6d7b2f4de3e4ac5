"""Speed of the retraining oracle, and how reliable its truth is.

1. Throughput of executor "ensemble" against a plain PyTorch loop that trains one model after the other, in alternating
   rounds of one process, so that both meet the same machine. One thread each.
2. 22 subsets of 50 digits, 256 retrainings without each and 256 with all samples: time, and the correlation between mu
   from disjoint halves of the retrainings (Spearman, mean over 40 single-example queries; Spearman-Brown for all runs).

    python -m benchmarks oracle            # about five minutes on two cores
    python -m benchmarks oracle --quick
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import finfluence as fi
from benchmarks._records import Record, parser
from finfluence.runs.oracle import Ensemble, Retraining

SAMPLES, BATCH, QUERIES, SUBSETS, SUBSET_SIZE = 500, 20, 40, 22, 50
OPTIMIZERS = {"sgd": fi.SGD(lr=0.1, momentum=0.9), "adamw": fi.AdamW(lr=0.003)}


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def digits() -> tuple[TensorDataset, dict[str, tuple[Tensor, Tensor]]]:
    """Training data with 10 % of labels flipped, and single-example queries."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    inputs = torch.tensor(pixels[order] / 16, dtype=torch.float32)
    targets = torch.tensor(labels[order])
    train = targets[:SAMPLES].clone()
    flipped = generator.choice(SAMPLES, SAMPLES // 10, replace=False)
    train[flipped] = (train[flipped] + torch.from_numpy(generator.integers(1, 10, len(flipped)))) % 10
    places = range(SAMPLES, SAMPLES + QUERIES)
    queries = {f"digit-{i}": (inputs[i : i + 1], targets[i : i + 1]) for i in places}
    return TensorDataset(inputs[:SAMPLES], train), queries


def plain_loop(data: TensorDataset, trainings: int, *, epochs: int, optimizer: str) -> int:
    """One model after the other, as one writes it by hand; returns the number of steps."""
    inputs, targets = data.tensors
    steps = 0
    for seed in range(trainings):
        model = mlp(seed)
        update = OPTIMIZERS[optimizer].build(model.parameters())
        for _ in range(epochs):
            order = torch.randperm(SAMPLES)
            for start in range(0, SAMPLES, BATCH):
                rows = order[start : start + BATCH]
                update.zero_grad()
                functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                update.step()
                steps += 1
    return steps


def experiment(directory: Path, *, epochs: int, optimizer: str, executor: Ensemble, progress: bool) -> Retraining:
    data, queries = digits()
    generator = np.random.default_rng(1)
    return Retraining(
        fi.ClassificationTask(),
        mlp,
        data,
        queries,
        subsets={f"subset-{k}": generator.choice(SAMPLES, SUBSET_SIZE, replace=False) for k in range(SUBSETS)},
        optimizer=OPTIMIZERS[optimizer],
        epochs=epochs,
        batch_size=BATCH,
        directory=directory,
        executor=executor,
        progress=progress,
    )


def rate(work: Callable[[], int]) -> tuple[float, float]:
    """Steps per second of wall time, and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    steps = work()
    return steps / (time.perf_counter() - wall), steps / (time.process_time() - processor)


def throughput(*, rounds: int, runs: int, epochs: int, optimizer: str) -> dict[str, Any]:
    """Alternates the loop and the ensemble, each with everything from building models to measured queries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, _ = digits()
    plain_loop(data, 1, epochs=1, optimizer=optimizer)
    walls, processors = [], []
    for number in range(rounds):
        loop = rate(lambda: plain_loop(data, 4, epochs=epochs, optimizer=optimizer))
        with tempfile.TemporaryDirectory() as folder:
            work = experiment(
                Path(folder), epochs=epochs, optimizer=optimizer, executor=Ensemble(workers=1), progress=False
            )
            steps = runs * (SUBSETS + 1) * epochs * SAMPLES // BATCH

            def train(work: Retraining = work, steps: int = steps) -> int:
                work.extend(runs)
                return steps

            ensemble = rate(train)
        walls.append(ensemble[0] / loop[0])
        processors.append(ensemble[1] / loop[1])
        print(
            f"  round {number}: loop {loop[0]:7,.0f} steps/s, ensemble {ensemble[0]:7,.0f} steps/s, "
            f"ratio {walls[-1]:.1f} (processor time {processors[-1]:.1f})",
            flush=True,
        )
    torch.set_num_threads(threads)
    return {
        "optimizer": optimizer,
        "wall": [statistics.median(walls), min(walls), max(walls)],
        "processor": statistics.median(processors),
    }


def full(*, runs: int, epochs: int, optimizer: str) -> dict[str, Any]:
    """The whole experiment, as `retrain` does it."""
    trainings = runs * (SUBSETS + 1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with experiment(Path(folder), epochs=epochs, optimizer=optimizer, executor=Ensemble(), progress=True) as work:
            truth = work.extend(runs)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    steps = trainings * epochs * SAMPLES // BATCH
    first, second = truth.split_halves()
    half = float(np.mean([np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in zip(first, second, strict=True)]))
    mu, se = truth.matrix()
    return {
        "optimizer": optimizer,
        "trainings": trainings,
        "epochs": epochs,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "rate": steps / seconds,
        "megabytes": size / 1e6,
        "failed": len(truth.failed()),
        "half": half,
        "whole": 2 * half / (1 + half),
        "sd": float(mu.std(axis=1).mean()),
        "se": float(se.mean()),
    }


def main(words: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--part", choices=["throughput", "full", "both"], default="both")
    made.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    arguments = made.parse_args(words)
    record = Record("oracle", arguments, seeds=0)
    if arguments.part != "full":
        rounds, runs, epochs = (1, 8, 1) if arguments.quick else (5, 24, 8)
        record.table(
            f"Steps a second, ensemble over a plain loop, one thread each, {rounds} rounds",
            {
                "optimizer": "optimizer",
                "wall": "wall time, median (lowest to highest)|.1f",
                "processor": "processor time|.1f",
            },
            [throughput(rounds=rounds, runs=runs, epochs=epochs, optimizer=arguments.optimizer)],
        )
    if arguments.part != "throughput":
        runs, epochs = (4, 1) if arguments.quick else (256, 20)
        record.table(
            f"{SUBSETS} subsets of {SUBSET_SIZE}, {runs} retrainings an arm",
            {
                "optimizer": "optimizer",
                "trainings": "trainings|,d",
                "epochs": "epochs",
                "seconds": "seconds|.0f",
                "threads": "threads",
                "rate": "steps a second|,.0f",
                "half": "split-half reliability|.3f",
                "whole": "of all runs (Spearman–Brown)|.3f",
                "sd": "sd of μ over subsets|.2f",
                "se": "mean se|.2f",
                "failed": "failed",
            },
            [full(runs=runs, epochs=epochs, optimizer=arguments.optimizer)],
        )


if __name__ == "__main__":
    main()
