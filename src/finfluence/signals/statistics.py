"""Statistics of signals in one streaming pass: per sample, per step, and as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from finfluence.signals._chunks import Chunk, Chunks
from finfluence.signals._schema import SignalTable
from finfluence.signals.store import SignalStore

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SignalArrays:
    """The signals of one query as arrays, in the order of the steps.

    Attributes:
        steps: (n_signals,) int64 step numbers.
        codes: (n_signals,) int64 positions of the samples in the sample table.
        values: (n_signals,) float32 signals.
    """

    steps: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def arrays(store: SignalStore, query: str, *, table: SignalTable = "signals") -> SignalArrays:
    """Read the signals of a query into memory: 20 bytes a signal.

    Args:
        store: the run.
        query: the query's name.
        table: "signals", "live", "panel" or "self".

    Raises:
        InputError: an unknown query or table.
        StoreError: a damaged part, or a sample that the sample table lacks.
    """
    chunks = list(Chunks(store, query, table=table).read())
    if not chunks:
        return SignalArrays(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    positions = np.concatenate([chunk.steps for chunk in chunks])
    codes = np.concatenate([chunk.codes for chunk in chunks])
    values = np.concatenate([chunk.values for chunk in chunks])
    if np.any(positions[1:] < positions[:-1]):
        order = np.argsort(positions, kind="stable")
        positions, codes, values = positions[order], codes[order], values[order]
    return SignalArrays(store.step_numbers[positions], codes, values)


def step_means(store: SignalStore, query: str, *, table: SignalTable = "signals") -> pl.DataFrame:
    """Return the mean signal of each step.

    Args:
        store: the run.
        query: the query's name.
        table: "signals", "live", "panel" or "self".

    Returns:
        One row a step that has signals, by step: `step` int64, `size` int64 (signals in the step), `mean` float64.

    Raises:
        InputError: an unknown query or table.
        StoreError: a damaged part.
    """
    counts, totals = _step_totals(store, query, table)
    present = counts > 0
    frame = {"step": store.step_numbers[present], "size": counts[present], "mean": totals[present] / counts[present]}
    return pl.DataFrame(frame)


def per_sample(store: SignalStore, query: str, *, table: SignalTable = "signals") -> pl.DataFrame:
    """Return each sample's visits, sum, mean, variance and centred sum of its signals.

    One pass where no step lies in two chunks of parts, as a writer's flushes leave them; otherwise a pass over steps
    and values comes first. A non-finite signal makes its sample's figures non-finite, and the centred sums of the
    samples that share its step.

    Args:
        store: the run.
        query: the query's name.
        table: "signals", "live", "panel" or "self".

    Returns:
        One row a sample, in the order of the sample table: `sample`; `visits` int64; `total` float64, the sum of the
        sample's signals; `mean` and `variance` float64, over its visits, the variance with divisor visits - 1, null
        where there are too few visits; `centred_total` float64, the sum over its visits of x_it - xbar_t, xbar_t the
        mean of the step's signals: the shift of removing S is minus its sum over S.

    Raises:
        InputError: an unknown query or table.
        StoreError: a damaged part, or a sample that the sample table lacks.
    """
    chunks = Chunks(store, query, table=table)
    ids = store.samples().select("sample").collect()["sample"]
    means: FloatArray | None = None
    if not chunks.separate:
        step_counts, step_sums = _step_totals(store, query, table)
        means = step_sums / np.maximum(step_counts, 1)
    moments = _Moments(ids.len())
    centred = np.zeros(ids.len())
    with np.errstate(invalid="ignore", over="ignore"):
        for chunk in chunks.read():
            values = chunk.values.astype(np.float64)
            moments.add(chunk.codes, values)
            values -= _means_of_rows(chunk, values) if means is None else means[chunk.steps]
            centred += np.bincount(chunk.codes, weights=values, minlength=ids.len())
    frame = pl.DataFrame(
        {
            "sample": ids,
            "visits": moments.counts,
            "total": moments.totals,
            "mean": moments.means,
            "variance": moments.squares / np.maximum(moments.counts - 1, 1),
            "centred_total": centred,
        }
    )
    return frame.with_columns(
        pl.when(pl.col("visits") > 0).then("mean").alias("mean"),
        pl.when(pl.col("visits") > 1).then("variance").alias("variance"),
    )


class _Moments:
    """Count, mean and sum of squared deviations per sample, joined chunk by chunk.

    The squares are taken around each chunk's own means and joined by Chan, Golub and LeVeque (1979), "Updating formulae
    and a pairwise algorithm for computing sample variances", eq. 2.1: sums of raw squares would lose a small variance
    beside a large mean.
    """

    def __init__(self, samples: int) -> None:
        self.counts = np.zeros(samples, dtype=np.int64)
        self.totals = np.zeros(samples)
        self.means = np.zeros(samples)
        self.squares = np.zeros(samples)

    def add(self, codes: npt.NDArray[np.int64], values: FloatArray) -> None:
        """Join the rows of a chunk: (rows,) sample positions and (rows,) values."""
        counts = np.bincount(codes, minlength=self.counts.size)
        totals = np.bincount(codes, weights=values, minlength=self.counts.size)
        means = totals / np.maximum(counts, 1)
        deviations = values - means[codes]
        deviations *= deviations
        squares = np.bincount(codes, weights=deviations, minlength=self.counts.size)
        joined = self.counts + counts
        share = counts / np.maximum(joined, 1)
        shift = means - self.means
        # Where a chunk has no row of a sample its share is 0, and the sample's figures stay, non-finite ones too.
        shift[counts == 0] = 0.0
        self.squares += squares + shift * shift * (self.counts * share)
        self.means += shift * share
        self.totals += totals
        self.counts = joined


def _means_of_rows(chunk: Chunk, values: FloatArray) -> FloatArray:
    """Return, for each row, the mean over its step: (rows,), where the chunk holds all rows of its steps."""
    if not chunk.steps.size:
        return np.empty(0)
    window = chunk.steps - chunk.steps.min()
    totals = np.bincount(window, weights=values)
    return (totals / np.maximum(np.bincount(window), 1))[window]


def _step_totals(store: SignalStore, query: str, table: SignalTable) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Return the number and the sum of the signals of each recorded step: (n_steps,) each."""
    counts = np.zeros(store.n_steps, dtype=np.int64)
    totals = np.zeros(store.n_steps)
    with np.errstate(invalid="ignore"):
        for chunk in Chunks(store, query, table=table).read(samples=False):
            if not chunk.steps.size:
                continue
            first = int(chunk.steps.min())
            found = np.bincount(chunk.steps - first)
            counts[first : first + found.size] += found
            totals[first : first + found.size] += np.bincount(chunk.steps - first, weights=chunk.values)
    return counts, totals
