"""A small training in float64, and what a replay of it must find: the derivative by retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.runs.engine import Engine, isolated_rng
from finfluence.runs.panel import NoisePanel
from finfluence.runs.plan import Plan
from finfluence.runs.sampling import Batch

N, FEATURES, CLASSES = 23, 5, 3  # no multiple of the batch size
TASK = fi.ClassificationTask()
EXACT = fi.runs.ReplayOptions(damping=0.0, second_moment="exact", clip_derivative="exact", hessian="exact")


def dataset(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), torch.randint(0, CLASSES, (N,), generator=generator))


def queries(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, CLASSES, (4,), generator=generator)
    return {"several": (inputs[:3], targets[:3]), "one": (inputs[3:], targets[3:])}


def mlp(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES)]
        return nn.Sequential(*layers).double().to(dtype)


def train(directory: Path, *, model: nn.Module | None = None, data: Any = None, **changes: Any) -> fi.Run:
    """A run of 15 steps in four segments, replayed by its true derivative."""
    settings: dict[str, Any] = {
        "queries": queries(),
        "optimizer": fi.SGD(lr=0.5),
        "epochs": 3,
        "batch_size": 5,
        "seed": 3,
        "sensitivity": "replay",
        "checkpoint_every": 4,
        "panel": NoisePanel(6, 2),
        "replay_options": EXACT,
    }
    settings |= {"directory": directory} | changes
    return fi.train(settings.pop("task", TASK), model or mlp(), data or dataset(), **settings)


def step_signals(run: fi.Run, step: int, *, table: Any = "signals") -> np.ndarray:
    """(b, n_queries) float64 signals of a step, in the batch's order."""
    frame = run.signals(table=table).filter(pl.col("step") == step).select(run.queries).collect()
    return frame.to_numpy().astype(np.float64)


class _Perturbed(Engine):
    """Moves the weight of one sample at one step: of a slot of the batch, or of a row that joins the batch."""

    def configure(self, step: int, size: float, *, slot: int | None = None, row: int | None = None) -> None:
        self.at, self.size, self.slot, self.row = step, size, slot, row

    def backward(self, batch: Batch, around: Any = None) -> float:
        self.active, self.seen, self.denominator = batch.step == self.at, 0, batch.denominator
        return super().backward(batch, around)

    def losses(self, model: Any, indices: np.ndarray) -> Tensor:
        values = super().losses(model, indices)
        first, self.seen = self.seen, self.seen + len(indices)
        if not self.active:
            return values
        if self.slot is not None and first <= self.slot < self.seen:
            bump = torch.zeros_like(values)
            bump[self.slot - first] = self.size
            return values * (1.0 + bump)
        if self.row is not None and first == 0:
            joined = super().losses(model, np.array([self.row]))
            return torch.cat([values[:1] + self.size * joined, values[1:]])
        return values


def brute_force(
    run: fi.Run, step: int, *, slot: int | None = None, row: int | None = None, size: float = 1e-3, **problem: Any
) -> np.ndarray:
    """(n_queries,) derivative of the measurements by one sample's weight: extrapolated central differences of runs.

    Measured is the mean after the run's `measured_epochs`.
    """
    plan = Plan.from_dict(run.manifest["plan"])
    per_epoch = run.steps().height // int(run.manifest["epochs"])
    ends = {round(epoch * per_epoch) for epoch in run.measured_epochs}
    make = problem.get("make", mlp)
    task, data, asked = problem.get("task", TASK), problem.get("data") or dataset(), problem.get("queries") or queries()

    def measured(size: float) -> np.ndarray:
        model = make()
        engine = _Perturbed(task, model, dataset=data, plan=plan)
        engine.configure(step, size, slot=slot, row=row)
        values = []
        with isolated_rng(torch.device("cpu")):
            for batch in engine.batches():
                engine.step(batch)
                if batch.step + 1 in ends:
                    model.eval()
                    with torch.no_grad():
                        values.append([float(task.measure(model, batch)) for batch in asked.values()])
                    model.train()
        return np.mean(values, axis=0)

    def central(size: float) -> np.ndarray:
        return (measured(size) - measured(-size)) / (2 * size)

    return (4 * central(size / 2) - central(size)) / 3


def check_against_brute_force(run: fi.Run, places: list[tuple[int, int]], *, tolerance: float, **problem: Any) -> None:
    """Signals at (step, slot) equal the retrained derivative, relative to the step's largest signal of the query."""
    for step, slot in places:
        signals = step_signals(run, step)
        scale = np.abs(signals).max(axis=0)
        assert (scale > 0).all()
        error = np.abs(signals[slot] - brute_force(run, step, slot=slot, **problem)) / scale
        assert error.max() < tolerance, (step, slot, error)
