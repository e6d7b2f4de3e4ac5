"""The noise panel: random samples evaluated at a grid of positions in every epoch.

A run sees every sample once an epoch, so how a sample's signal varies with its position is not observed. The panel
observes it for a few samples; with every sample on it, it gives the "full" signals (method: combinatorial central limit
theorem, Hoeffding 1951).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finfluence.errors import InputError
from finfluence.gradients import Direction, HookedDerivatives, per_sample_derivatives
from finfluence.runs.engine import Engine
from finfluence.runs.sampling import Batch

_PANEL_STREAM = 0x9A4E1
# Samples of the panel in one pass. A large model gets no more than the training's own micro-batches, which are known to
# fit; a small one is faster with more.
_CHUNK = 1024
_SMALL_MODEL = 1_000_000


@dataclass(frozen=True)
class NoisePanel:
    """Which samples are evaluated at which positions of every epoch.

    Attributes:
        samples: number of samples, drawn at random; 0 for no panel.
        positions: positions of the grid in each epoch, evenly spaced, with an offset that differs from epoch to epoch.
    """

    samples: int = 64
    positions: int = 4

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            raise InputError(f"a panel needs 0 or at least 2 samples, got {self.samples}")
        if self.positions < 2:
            raise InputError(f"a panel needs at least 2 positions an epoch to see a variance, got {self.positions}")

    def members(self, n: int, *, seed: int) -> np.ndarray:
        """(m,) sorted int64 indices of the panel's samples among n."""
        if self.samples >= n:
            return np.arange(n)
        generator = np.random.default_rng(np.random.SeedSequence([seed, _PANEL_STREAM]))
        return np.sort(generator.choice(n, self.samples, replace=False))

    def grid(self, steps_per_epoch: int, *, seed: int, epoch: int) -> np.ndarray:
        """(g,) positions within an epoch at which the panel is evaluated, ascending."""
        if not self.samples:
            return np.empty(0, dtype=np.int64)
        if self.positions >= steps_per_epoch:
            return np.arange(steps_per_epoch)
        generator = np.random.default_rng(np.random.SeedSequence([seed, _PANEL_STREAM, epoch]))
        spacing = steps_per_epoch / self.positions
        return np.floor((np.arange(self.positions) + generator.random()) * spacing).astype(np.int64)

    def has(self, batch: Batch, engine: Engine) -> bool:
        """Whether the panel is evaluated at a step of a training."""
        return batch.position in self.grid(engine.steps_per_epoch, seed=engine.plan.seed, epoch=batch.epoch)


def full_panel(n: int, positions: int) -> NoisePanel:
    """The panel of every sample, for full signals."""
    return NoisePanel(samples=max(n, 2), positions=positions)


def panel_signals(
    engine: Engine,
    indices: np.ndarray,
    directions: Sequence[Direction],
    *,
    step: int,
    chunk: int | None = None,
    hooks: HookedDerivatives | None = None,
) -> np.ndarray:
    """The signals that samples would have had in a step's batch.

    Args:
        engine: the training, at the parameters before the step.
        indices: (m,) rows of the dataset.
        directions: sensitivities of the step, one a query.
        step: the step, which fixes the dropout masks.
        chunk: samples in one pass, which bounds the memory; None for 1024, and for models of more than a million
            parameters the size of the training's micro-batches.
        hooks: hooks that are on the model already, which saves putting on new ones and a forward pass.

    Returns:
        (m, n_queries) float64, ⟨q, ∇ℓ_i⟩, without the weight 1/b.
    """
    if chunk is None:
        large = engine.model_size > _SMALL_MODEL
        chunk = -(-engine.plan.batch_size // engine.plan.accumulation) if large else _CHUNK
    engine.seed(step)
    parts = [
        _derivatives(engine, rows, directions, hooks)
        for rows in np.array_split(indices, max(1, -(-len(indices) // chunk)))
    ]
    return torch.cat(parts).double().cpu().numpy()


def _derivatives(
    engine: Engine, rows: np.ndarray, directions: Sequence[Direction], hooks: HookedDerivatives | None
) -> torch.Tensor:
    if hooks is None:
        return per_sample_derivatives(
            lambda model: engine.losses(model, rows), engine.model, parameters=engine.parameters, directions=directions
        )
    with hooks.record(directions, len(rows), partial=True) as recording:
        hooks.backward(engine.losses(engine.model, rows).sum())
    return recording.values
