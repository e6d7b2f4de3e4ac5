"""Is μ calibrated? One recorded run's estimates against retraining with and without each of 22 subsets.

    python -m benchmarks.calibration                        # all settings, 256 retrainings an arm
    python -m benchmarks.calibration --settings tanh-sgd --runs 64

Digits (500 samples, 10 % of the labels flipped), 40 single-example queries from held-out data, batch 20, 20 epochs, fixed
initialisation. A rank agreement is always printed beside its ceiling, which the truth's own noise sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import finfluence as fi
from finfluence.influence import agreement, ceiling, detection
from finfluence.influence import pool as pool_frames
from finfluence.runs.panel import NoisePanel
from finfluence.workflows.digits import digits, mlp

N_QUERIES = 40


@dataclass(frozen=True)
class Setting:
    """One row of the table: how the network is built and trained."""

    name: str
    make_model: Callable[[int], nn.Module]
    optimizer: Any
    epochs: int = 20
    options: dict[str, Any] = field(default_factory=dict)


def cnn(seed: int) -> nn.Module:
    """A small convolutional network with GroupNorm on 8×8 images given as 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def relu_mlp(seed: int) -> nn.Module:
    return mlp(seed, activation="relu")


SETTINGS = {
    s.name: s
    for s in (
        Setting("tanh-sgd", mlp, fi.SGD(lr=0.1)),
        Setting("relu-sgd", relu_mlp, fi.SGD(lr=0.1)),
        Setting("relu-adamw", relu_mlp, fi.AdamW(lr=0.003)),
        Setting("tanh-adamw", mlp, fi.AdamW(lr=0.003)),
        Setting("cnn-momentum", cnn, fi.SGD(lr=0.02, momentum=0.9)),
        Setting("tanh-sgd-fast", mlp, fi.SGD(lr=0.5)),
        Setting("tanh-sgd-100", mlp, fi.SGD(lr=0.1), epochs=100),
    )
}


@dataclass(frozen=True)
class Problem:
    """Data, queries and subsets that all settings share."""

    recipe: Any
    queries: dict[str, Any]
    subsets: dict[str, np.ndarray]
    planted: np.ndarray


def problem(seed: int = 0) -> Problem:
    """Digits with flips, 40 held-out single-example queries, 22 subsets: labels, clusters, and chunks of the flips."""
    from sklearn.cluster import KMeans

    recipe = digits(samples=500, seed=seed)
    assert recipe.samples is not None
    generator = np.random.default_rng(seed)
    x, y = recipe.held_out.tensors
    chosen = generator.choice(len(x), N_QUERIES, replace=False)
    queries = {f"q{k}": (x[i : i + 1], y[i : i + 1]) for k, i in enumerate(chosen.tolist())}
    queries["validation"] = tuple(recipe.queries["validation"].tensors)
    labels, planted = recipe.samples["label"].to_numpy(), recipe.samples["planted"].to_numpy()
    subsets = {f"label-{c}": generator.permutation(np.flatnonzero(labels == c))[:25] for c in range(10)}
    flips = generator.permutation(np.flatnonzero(planted))
    subsets |= {f"flips-{k}": part for k, part in enumerate(np.array_split(flips, 4))}
    pixels = recipe.dataset.tensors[0].numpy()
    centres = KMeans(8, n_init=4, random_state=seed).fit(pixels).transform(pixels)
    subsets |= {f"cluster-{k}": np.argsort(centres[:, k])[:25] for k in range(8)}
    return Problem(recipe, queries, {k: np.sort(v) for k, v in subsets.items()}, planted)


def truth_of(setting: Setting, data: Problem, runs: int, directory: Path) -> fi.Truth:
    return fi.retrain(
        data.recipe.task,
        setting.make_model,
        data.recipe.dataset,
        data.queries,
        subsets=data.subsets,
        optimizer=setting.optimizer,
        epochs=setting.epochs,
        batch_size=20,
        runs=runs,
        initialisation="fixed",
        executor="ensemble",
        directory=directory,
        **setting.options,
    )


def record(setting: Setting, data: Problem, directory: Path, *, seed: int, signals: Any, positions: int) -> fi.Run:
    return fi.train(
        data.recipe.task,
        setting.make_model(0),
        data.recipe.dataset,
        queries=data.queries,
        optimizer=setting.optimizer,
        epochs=setting.epochs,
        batch_size=20,
        seed=seed,
        sensitivity="both",
        signals=signals,
        panel=NoisePanel(64, positions),
        samples=data.recipe.samples,
        directory=directory,
        **setting.options,
    )


def estimates(run: fi.Run, data: Problem, sensitivity: Any) -> tuple[np.ndarray, np.ndarray]:
    frames = [run.influence(q, subsets=data.subsets, sensitivity=sensitivity) for q in data.queries if q != "validation"]
    return np.array([f["mu"].to_numpy() for f in frames]), np.array([f["se"].to_numpy() for f in frames])


def flips_found(run: fi.Run, data: Problem, sensitivity: Any) -> float:
    mu = run.influence("validation", sensitivity=sensitivity)["mu"].to_numpy()
    return detection(-mu, data.planted).auroc


def evaluate(setting: Setting, data: Problem, *, runs: int, seeds: int, truth_directory: Path) -> list[dict[str, Any]]:
    began = time.perf_counter()
    truth = truth_of(setting, data, runs, truth_directory / setting.name)
    truth_seconds = time.perf_counter() - began
    names = [q for q in data.queries if q != "validation"]
    mu, se = truth.matrix(names)
    top = ceiling(*truth.split_halves(names))
    rows: list[dict[str, Any]] = []
    found: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
    for seed in range(1, seeds + 1):
        for signals in ("batch", "full"):
            with tempfile.TemporaryDirectory() as scratch:
                run = record(setting, data, Path(scratch) / "run", seed=seed, signals=signals, positions=5)
                kinds = {"replay, batch" if signals == "batch" else "replay, full": "run"}
                if signals == "batch":
                    kinds["live, batch"] = "live"
                for kind, sensitivity in kinds.items():
                    found.setdefault(kind, []).append((*estimates(run, data, sensitivity), flips_found(run, data, sensitivity)))
    for kind, results in found.items():
        scores = [agreement(m, mu, ceiling=top, estimated_se=s, truth_se=se) for m, s, _ in results]
        rows.append(
            {
                "setting": setting.name,
                "signals": kind,
                "spearman": float(np.mean([a.spearman for a in scores])),
                "ceiling": top.correlation,
                "slope": float(np.mean([a.slope for a in scores])),
                "slope_low": float(np.mean([a.slope_interval[0] for a in scores])),
                "slope_high": float(np.mean([a.slope_interval[1] for a in scores])),
                "coverage": float(np.mean([a.coverage for a in scores])),
                "auroc": float(np.mean([auroc for _, _, auroc in results])),
                "runs": len(results),
                "retrainings": runs,
                "truth_seconds": truth_seconds,
            }
        )
        if len(results) > 1:
            pooled = pooled_estimates(results)
            a = agreement(pooled[0], mu, ceiling=top, estimated_se=pooled[1], truth_se=se)
            rows.append(
                rows[-1]
                | {
                    "signals": f"{kind}, {len(results)} runs pooled",
                    "spearman": a.spearman,
                    "slope": a.slope,
                    "slope_low": a.slope_interval[0],
                    "slope_high": a.slope_interval[1],
                    "coverage": a.coverage,
                    "auroc": float("nan"),
                }
            )
    return rows


def pooled_estimates(results: list[tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray]:
    from finfluence.influence import pool_estimates

    shape = results[0][0].shape
    mu, se, _ = pool_estimates(np.array([m.ravel() for m, _, _ in results]), np.array([s.ravel() for _, s, _ in results]))
    return mu.reshape(shape), se.reshape(shape)


HEAD = "| setting | signals | Spearman | ceiling | slope true on estimated | 95 % coverage | AUROC of flips |\n|---|---|---|---|---|---|---|"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [HEAD]
    for r in rows:
        auroc = "" if np.isnan(r["auroc"]) else f"{r['auroc']:.3f}"
        lines.append(
            f"| {r['setting']} | {r['signals']} | {r['spearman']:.3f} | {r['ceiling']:.3f} | "
            f"{r['slope']:.2f} ({r['slope_low']:.2f} to {r['slope_high']:.2f}) | {r['coverage']:.0%} | {auroc} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=256, help="retrainings an arm")
    parser.add_argument("--seeds", type=int, default=3, help="recorded runs, also pooled")
    parser.add_argument("--truth", type=Path, default=None, help="keep (and reuse) the retrainings here")
    parser.add_argument("--output", type=Path, default=None, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="16 retrainings, one run, 3 epochs: a smoke test")
    options = parser.parse_args(arguments)
    data = problem()
    rows: list[dict[str, Any]] = []
    scratch = Path(tempfile.mkdtemp())
    try:
        for name in options.settings:
            setting = SETTINGS[name]
            runs, seeds = options.runs, options.seeds
            if options.quick:
                setting, runs, seeds = replace(setting, epochs=3), 16, 1
            rows += evaluate(setting, data, runs=runs, seeds=seeds, truth_directory=options.truth or scratch)
            print(table(rows[-6:]), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{table(rows)}")
    if options.output:
        options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
