"""Which samples make up which batch: the samplers whose randomness an influence is measured against.

A sampler is a pure function of (number of samples, batch size, seed, epoch), so a killed run resumes with the same
batches, a replay walks them backwards, and every executor of the retraining oracle trains on the same ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from finfluence.errors import InputError

SamplerKind = Literal["shuffled", "with-replacement", "poisson"]

_ORDER_STREAM = 0x0F1  # keeps the batch order independent of other streams drawn from the same seed


class Batch(NamedTuple):
    """One optimizer step's samples.

    Attributes:
        step: index of the step in the run, from 0.
        epoch: index of the epoch, from 0.
        position: index of the batch within its epoch, from 0.
        indices: (b,) int64, rows of the dataset.
        denominator: what the sum of the batch's losses is divided by (b for a mean; the expected batch size under
            Poisson sampling).
    """

    step: int
    epoch: int
    position: int
    indices: np.ndarray
    denominator: float


@dataclass(frozen=True)
class Sampler:
    """How an epoch's batches are drawn.

    Attributes:
        kind: "shuffled" cuts a fresh permutation of all samples into batches each epoch; "with-replacement" draws every
            slot independently and uniformly; "poisson" includes each sample independently with probability b/n (batch
            sizes vary and the loss is the sum over the batch divided by b, as in DP-SGD).
        drop_last: whether a shuffled epoch drops its last, smaller batch.
    """

    kind: SamplerKind = "shuffled"
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise InputError(f"unknown sampler {self.kind!r}; choose one of {', '.join(get_args(SamplerKind))}")

    def steps_per_epoch(self, n: int, batch_size: int) -> int:
        """Number of optimizer steps in one epoch over n samples.

        Raises:
            InputError: the batch size is not between 1 and n.
        """
        if not 1 <= batch_size <= n:
            raise InputError(f"batch_size must lie between 1 and the number of samples ({n}), got {batch_size}")
        return n // batch_size if self.drop_last else math.ceil(n / batch_size)

    def boundaries(self, n: int, batch_size: int, *, population: int | None = None) -> np.ndarray:
        """Where a shuffled epoch's permutation is cut.

        Args:
            n: number of samples.
            batch_size: samples in a full batch.
            population: number of samples that the batches are cut for, at least n; None for n. Fewer samples are
                spread over as many batches in the same proportions, so that training without a subset has the steps
                and the epochs of training with it. (Full batches of fewer samples would leave the last epoch
                unfinished, where shuffling noise is larger than at an epoch's end: the removed samples' influence would
                be measured in another unit.)

        Returns:
            (steps + 1,) int64, ascending from 0.
        """
        whole = n if population is None else population
        steps = self.steps_per_epoch(whole, batch_size)
        cuts = np.minimum(np.arange(steps + 1) * batch_size, whole)
        return np.rint(cuts * (n / whole)).astype(np.int64)

    def epoch(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        kept: np.ndarray | None = None,
        population: int | None = None,
    ) -> list[np.ndarray]:
        """The batches of one epoch.

        Training on a part of the data has the order of training on all of it, less the samples that are left out. Its
        law is that of an order drawn for the part alone, and two trainings with one seed have most of it in common.

        Args:
            n: number of samples in the data.
            batch_size: samples in a full batch.
            seed: the run's seed.
            epoch: index of the epoch; every epoch has a random stream of its own.
            kept: (m,) int64 rows that are trained on, ascending; None for all n.
            population: number of samples that batches are cut for, see `boundaries`; None for those trained on. The
                inclusion probability of Poisson sampling is batch_size / population.

        Returns:
            One (b,) int64 array of sample indices per step.
        """
        own = n if kept is None else len(kept)
        whole = own if population is None else population
        steps = self.steps_per_epoch(whole, batch_size)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _ORDER_STREAM, epoch])))
        inside = np.zeros(n, dtype=bool)
        inside[slice(None) if kept is None else kept] = True
        if self.kind == "shuffled":
            order = generator.permutation(n)
            if kept is not None:
                order = order[inside[order]]
            cuts = self.boundaries(own, batch_size, population=population)
            return [order[start:stop] for start, stop in itertools.pairwise(cuts)]
        if self.kind == "with-replacement":
            drawn = generator.integers(0, n, size=(steps, batch_size))
            if kept is not None:
                # a draw of a sample that is left out is made again, among the others
                drawn = np.where(inside[drawn], drawn, kept[generator.integers(0, own, size=drawn.shape)])
            return list(drawn)
        return [np.flatnonzero((generator.random(n) < batch_size / whole) & inside) for _ in range(steps)]

    def batches(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int,
        steps: int,
        start: int = 0,
        kept: np.ndarray | None = None,
        population: int | None = None,
    ) -> Iterator[Batch]:
        """All batches of a run of `steps` steps, beginning with step `start`; `kept`, `population` as in `epoch`."""
        own = n if kept is None else len(kept)
        per_epoch = self.steps_per_epoch(own if population is None else population, batch_size)
        step = start
        while step < steps:
            epoch, first = divmod(step, per_epoch)
            batches = self.epoch(n, batch_size, seed=seed, epoch=epoch, kept=kept, population=population)
            for position, indices in enumerate(batches[first:], first):
                if step >= steps:
                    return
                denominator = float(batch_size if self.kind == "poisson" else len(indices))
                yield Batch(step, epoch, position, indices, denominator)
                step += 1
