"""Batch orders of many trainings at once, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from finfluence.runs.oracle.problem import Job, Problem

_BLOCK_BYTES = 16 << 20


class StepBatches(NamedTuple):
    """One step's batches of M trainings.

    Attributes:
        rows: (M, w) int64 rows of the dataset, w the largest batch of the step; smaller ones are padded.
        weights: (M, w) weight of each sample's loss: 1 / denominator, 0 on padding.
    """

    rows: np.ndarray
    weights: np.ndarray


class BatchOrders:
    """The batches that `Sampler.batches` gives each of M trainings, laid out step by step.

    Args:
        problem: sampler, batch size and arms.
        jobs: the M trainings; their arms may differ in size.
        dtype: of the weights.
    """

    def __init__(self, problem: Problem, jobs: Sequence[Job], *, dtype: type[np.floating] = np.float32) -> None:
        self.dtype = dtype
        self.jobs, self.plan, self.n = list(jobs), problem.plan, problem.n
        kept = {arm: problem.arms[arm].kept(problem.n) for arm in {job.arm for job in jobs}}
        self.kept = [kept[job.arm] for job in self.jobs]
        self.population = [problem.population(job.arm) for job in self.jobs]
        self.per_epoch = [self.plan.sampler.steps_per_epoch(size, self.plan.batch_size) for size in self.population]

    def steps(self, total: int) -> Iterator[StepBatches]:
        """The batches of steps 0 to total - 1."""
        # blocks of whole epochs, so that trainings of equal length shuffle each epoch once
        epoch_bytes = 12 * len(self.jobs) * self.plan.batch_size * max(self.per_epoch)
        block = max(self.per_epoch) * max(1, _BLOCK_BYTES // epoch_bytes)
        for start in range(0, total, block):
            yield from self._block(start, min(total, start + block))

    def _block(self, start: int, stop: int) -> Iterator[StepBatches]:
        size = self.plan.batch_size
        rows = np.zeros((stop - start, len(self.jobs), size), dtype=np.int64)
        lengths = np.zeros((stop - start, len(self.jobs)), dtype=np.int64)
        for m in range(len(self.jobs)):
            rows = self._fill(m, start, stop, rows=rows, lengths=lengths)
        poisson = self.plan.sampler.kind == "poisson"
        widths = np.maximum(lengths.max(axis=1), 1)
        places = np.arange(rows.shape[2])
        for k in range(stop - start):
            used = places[: widths[k]] < lengths[k][:, None]
            denominators = float(size) if poisson else np.maximum(lengths[k], 1)[:, None]
            yield StepBatches(rows[k, :, : widths[k]], (used / denominators).astype(self.dtype, copy=False))

    def _fill(self, m: int, start: int, stop: int, *, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Writes training m's batches of steps start to stop - 1 into the arrays, made wider where they must be."""
        kept, per_epoch = self.kept[m], self.per_epoch[m]
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            batches = self.plan.sampler.epoch(
                self.n,
                self.plan.batch_size,
                seed=self.jobs[m].seed,
                epoch=epoch,
                kept=kept,
                population=self.population[m],
            )
            first = max(start, epoch * per_epoch)
            last = min(stop, (epoch + 1) * per_epoch)
            batches = batches[first - epoch * per_epoch : last - epoch * per_epoch]
            counts = [len(batch) for batch in batches]
            if max(counts) > rows.shape[2]:
                rows = np.pad(rows, ((0, 0), (0, 0), (0, max(counts) - rows.shape[2])))
            samples, target = np.concatenate(batches), rows[first - start : last - start, m]
            width, full = rows.shape[2], len(counts) - (counts[-1] != rows.shape[2])
            if min(counts[:full], default=width) == width:
                target[:full] = samples[: full * width].reshape(full, width)
            else:
                full = 0
            # padding repeats a sample of the training's own, whose loss is as finite as the others
            place = np.arange(width) < np.array(counts[full:], dtype=np.int64)[:, None]
            target[full:] = kept[0]
            target[full:][place] = samples[full * width :]
            lengths[first - start : last - start, m] = counts
        return rows
