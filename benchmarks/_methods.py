"""Scores of every training sample: finfluence's, and the cheap baselines that need no library."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

import finfluence as fi
from benchmarks._data import Problem, tensors
from benchmarks.peers.common import State, network, sample_loss
from finfluence.runs import Engine

QUERY = "query"


@dataclass
class Training:
    """One plain training of a problem.

    Attributes:
        checkpoints: parameters at the end of evenly spaced epochs, the last one included; at most ten.
        rates: mean learning rate of the steps that each stands for.
        seed: of the batch order.
        start: seed of the initial parameters.
    """

    problem: Problem
    checkpoints: list[State]
    rates: list[float]
    seed: int
    start: int


@dataclass
class Scores:
    """Scores of a method on one training, higher is more suspect.

    Attributes:
        value: (n,).
        flagged: (n,) bool where the method itself decides; None otherwise.
    """

    value: np.ndarray
    flagged: np.ndarray | None = field(default=None)


def plan(problem: Problem, seed: int) -> fi.Plan:
    return fi.Plan(
        optimizer=problem.optimizer,
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        seed=seed,
        schedule=problem.schedule,
    )


def train(problem: Problem, *, seed: int, start: int, most: int = 10) -> Training:
    """Trains as `fi.train` does with the same seeds, and keeps the parameters at the ends of epochs."""
    model = network(problem.network, seed=start)
    engine = Engine(fi.ClassificationTask(), model, dataset=problem.dataset, plan=plan(problem, seed))
    per_epoch = engine.total_steps // problem.epochs
    epochs = np.unique(np.linspace(problem.epochs, 0, most, endpoint=False).round().astype(int))
    wanted = {int(epoch) * per_epoch for epoch in epochs if epoch > 0}
    checkpoints: list[State] = []
    rates: list[float] = []
    factors: list[float] = []
    for batch in engine.batches():
        engine.step(batch)
        factors.append(problem.schedule.factor(batch.step, engine.total_steps))
        if batch.step + 1 in wanted:
            checkpoints.append({name: p.detach().clone() for name, p in model.state_dict().items()})
            rates.append(problem.optimizer.lr * float(np.mean(factors)))
            factors = []
    return Training(problem, checkpoints, rates, seed, start)


@contextmanager
def recorded(
    problem: Problem, *, seed: int, start: int, signals: str = "batch", positions: int = 5
) -> Iterator[fi.Run]:
    """A recorded and replayed run in a scratch folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield record(problem, Path(folder) / "run", seed=seed, start=start, signals=signals, positions=positions)


def record(
    problem: Problem, directory: Path, *, seed: int, start: int, signals: str = "batch", positions: int = 5
) -> fi.Run:
    n = len(problem.planted)
    return fi.train(
        fi.ClassificationTask(),
        network(problem.network, seed=start),
        problem.dataset,
        queries={QUERY: tensors(problem.asked)},
        optimizer=problem.optimizer,
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        seed=seed,
        schedule=problem.schedule,
        directory=directory,
        sensitivity="both" if signals == "batch" else "replay",
        signals=signals,  # pyright: ignore[reportArgumentType]
        self_influence="record" if signals == "batch" else "none",
        panel=fi.NoisePanel(min(64, n), positions),
        samples=pl.DataFrame({"sample": np.arange(n), "planted": problem.planted}),
        show_progress="never",
    )


def of_second_half(problem: Problem, run: fi.Run, *, start: int) -> fi.Run:
    """The recorded run replayed again, for the mean of the query over the second half of the epochs."""
    return fi.runs.replay(
        run.directory,
        fi.ClassificationTask(),
        network(problem.network, seed=start),
        dataset=problem.dataset,
        queries={QUERY: tensors(problem.asked)},
        options=fi.ReplayOptions(measure_epochs="second-half"),
        show_progress="never",
    )


def harmful(frame: pl.DataFrame, *, fdr: float = 0.05) -> Scores:
    """−μ, and what a false-discovery rate flags; the frame's p-values must be one-sided for "harmful"."""
    mu = frame["mu"].to_numpy()
    return Scores(-mu, (frame["q_value"].fill_null(1.0).to_numpy() <= fdr) & (mu < 0))


def standing_out(frame: pl.DataFrame, *, fdr: float = 0.05) -> Scores:
    """Self-influence: μ, and what stands out of the median sample."""
    mu = frame["mu"].to_numpy()
    return Scores(mu, (frame["q_value"].fill_null(1.0).to_numpy() <= fdr) & (mu > 0))


def own_scores(batch: fi.Run, full: fi.Run) -> dict[tuple[str, str], Scores]:
    """finfluence's scores of two recorded runs of one training, by (use, method)."""

    def asked(run: fi.Run, sensitivity: str) -> Scores:
        return harmful(run.influence(QUERY, alternative="harmful", sensitivity=sensitivity))  # pyright: ignore[reportArgumentType]

    return {
        ("query", "finfluence, live"): asked(batch, "live"),
        ("query", "finfluence, replay"): asked(batch, "run"),
        ("query", "finfluence, replay, full signals"): asked(full, "run"),
        ("self", "finfluence, self-influence (live)"): standing_out(batch.influence("self", alternative="supporting")),
    }


def baselines(training: Training) -> dict[tuple[str, str], Scores]:
    """Loss averaged over checkpoints, loss at the end, and gradients against the query's gradient over checkpoints."""
    problem = training.problem
    x, y = (torch.from_numpy(part) for part in problem.train)
    qx, qy = (torch.from_numpy(part) for part in problem.asked)
    model = network(problem.network)
    losses, dots, cosines = [], [], []
    for state in training.checkpoints:
        model.load_state_dict(state)
        with torch.no_grad():
            losses.append(functional.cross_entropy(model(x), y, reduction="none").numpy())
        gradient = torch.autograd.grad(functional.cross_entropy(model(qx), qy), list(model.parameters()))
        dot, norm = directional(model, (x, y), dict(zip(dict(model.named_parameters()), gradient, strict=True)))
        dots.append(dot)
        cosines.append(dot / np.maximum(norm, 1e-12))
    return {
        ("self", "loss, mean over checkpoints"): Scores(np.mean(losses, axis=0)),
        ("self", "loss, end of training"): Scores(losses[-1]),
        ("query", "gradient dot, mean over checkpoints"): Scores(-np.mean(dots, axis=0)),
        ("query", "gradient cosine, mean over checkpoints"): Scores(-np.mean(cosines, axis=0)),
    }


def directional(
    model: nn.Module, data: tuple[Tensor, Tensor], direction: dict[str, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ⟨∇ℓ_i, direction⟩ and ‖∇ℓ_i‖."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda p: sample_loss(model, p, (x, y)))(parameters)
        dot = sum((gradient[name] * direction[name]).sum() for name in parameters)
        square = sum((gradient[name] ** 2).sum() for name in parameters)
        return dot, square  # pyright: ignore[reportReturnType]

    dots, squares = torch.vmap(one, chunk_size=250)(*data)
    return dots.numpy(), squares.sqrt().numpy()
