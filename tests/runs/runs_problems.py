"""Small training problems and a training loop written without the library, to compare with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.runs.engine import step_seed

N, FEATURES, CLASSES = 42, 5, 3


def data(n: int = N, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Points in three noisy classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.randn(n, FEATURES, generator=generator, dtype=dtype)
    x[torch.arange(n), labels] += 1.5
    return TensorDataset(x, labels)


def queries(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two queries: a data set and a ready batch."""
    other = data(9, seed=5, dtype=dtype)
    return {"first": data(6, seed=4, dtype=dtype), "second": (other.tensors[0], other.tensors[1])}


def model(seed: int = 0, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small network with smooth activations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, CLASSES)]
        return nn.Sequential(*layers).to(dtype)


def parameters(net: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def record(directory: Path, net: nn.Module | None = None, **changes: Any) -> fi.Run:
    """`finfluence.train` on the small problem, quietly."""
    net = net if net is not None else model()
    dtype = next(net.parameters()).dtype
    given: dict[str, Any] = {
        "queries": queries(dtype),
        "optimizer": fi.SGD(lr=0.2, momentum=0.9),
        "epochs": 3,
        "batch_size": 8,
        "directory": directory,
        "panel": fi.NoisePanel(samples=6, positions=2),
        "show_progress": "never",
    }
    arguments = given | changes
    dataset = arguments.pop("dataset", None)
    return fi.train(fi.ClassificationTask(), net, data(dtype=dtype) if dataset is None else dataset, **arguments)


def bare_training(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: fi.Plan,
    *,
    dataset: TensorDataset,
    before_step: Any = None,
) -> list[float]:
    """The training that a plan describes, in plain PyTorch, with each step's random stream.

    `before_step(step, indices, denominator)` is called before each forward pass.
    """
    x, y = dataset.tensors
    n = len(x)
    losses = []
    total = plan.steps(n)
    for batch in plan.sampler.batches(n, plan.batch_size, seed=plan.seed, steps=total):
        rate = plan.optimizer.lr * plan.schedule.factor(batch.step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if before_step is not None:
            before_step(batch.step, batch.indices, batch.denominator)
        torch.manual_seed(step_seed(plan.seed, batch.step))
        optimizer.zero_grad()
        for rows in np.array_split(batch.indices, plan.accumulation):
            if len(rows):
                loss = functional.cross_entropy(net(x[rows]), y[rows], reduction="none").sum() / batch.denominator
                loss.backward()
                losses.append(float(loss.detach()))
        for p in net.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), plan.clip_norm)
        optimizer.step()
    return losses


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def sample_loss(net: nn.Module, dataset: TensorDataset, row: int) -> Tensor:
    x, y = dataset.tensors
    return functional.cross_entropy(net(x[row : row + 1]), y[row : row + 1])


def sensitivity(optimizer: torch.optim.Optimizer, net: nn.Module, measure: list[Tensor]) -> list[Tensor]:
    """The live sensitivity q_t of a measurement's gradient, from the optimizers' definitions."""
    found = []
    for group in optimizer.param_groups:
        for p, g in zip(net.parameters(), measure, strict=True):
            state = optimizer.state.get(p, {})
            if isinstance(optimizer, torch.optim.SGD):
                nesterov = 1 + group["momentum"] if group["nesterov"] else 1.0
                found.append(-group["lr"] * nesterov * g)
            elif not state:
                found.append(torch.zeros_like(g))  # a sign step: its derivative is zero
            else:
                beta1, beta2 = group["betas"]
                t = int(state["step"])
                root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt()
                found.append(-group["lr"] * (1 - beta1) / (1 - beta1 ** (t + 1)) * g / (root + group["eps"]))
    return found


def measures(dtype: torch.dtype = torch.float64) -> dict[str, Callable[[nn.Module], torch.Tensor]]:
    x, y = data(6, seed=4, dtype=dtype).tensors
    return {
        "first": lambda net: functional.cross_entropy(net(x), y),
        "second": lambda net: net(x)[:, 0].square().mean(),
    }


def batches(epochs: int = 2, size: int = 6, *, dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """(ids, x, y), shuffled anew every epoch, without touching the global random state."""
    x, y = data(dtype=dtype).tensors
    generator = torch.Generator().manual_seed(11)
    for _ in range(epochs):
        order = torch.randperm(N, generator=generator)
        for rows in order.split(size):
            yield rows, x[rows], y[rows]


class NoRecorder:
    """Stands in for a recorder in the bare loop."""

    def batch(self, ids: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()
