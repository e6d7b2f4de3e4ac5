"""The noise panel: samples evaluated on a grid of positions in every epoch, and its weights for all positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, Ints, bin_sums, check_codes, check_finite, integers, one_of

Positions = Literal["random", "regular"]


@dataclass(frozen=True)
class ShuffledEpochs:
    """A sampler that cuts a fresh uniform permutation of the samples into batches in every epoch.

    Attributes:
        n_samples: n, size of the training set.
        batch_size: b, samples in a full batch.
        drop_last: whether the n mod b samples behind the last full batch are left out of the epoch; otherwise they
            form a smaller last batch.
    """

    n_samples: int
    batch_size: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.n_samples < 2:
            raise InputError(f"n_samples is {self.n_samples}; influence needs at least two samples")
        if not 1 <= self.batch_size <= self.n_samples:
            raise InputError(f"batch_size is {self.batch_size}; it must lie between 1 and n_samples = {self.n_samples}")

    def sizes(self) -> Floats:
        """Return the number of samples at each position of an epoch, (P,)."""
        full, rest = divmod(self.n_samples, self.batch_size)
        sizes = [self.batch_size] * full + ([rest] if rest and not self.drop_last else [])
        return np.array(sizes, dtype=np.float64)

    def remainder_share(self) -> float:
        """Return the share of an epoch's σ² that falls to its smaller last batch, for signals alike but for weights.

        A batch of c samples weighs each 1/c, so Σ_{i,p} c_p d²_{i,p} has b²/c from it against n − c from the others. A
        step that large is not linear either: 141 texts in batches of 20, the last of one, overstated σ by 1.3.
        """
        sizes = self.sizes()
        weights = self.batch_size**2 / sizes
        return float(weights[-1] / weights.sum()) if sizes[-1] < self.batch_size else 0.0


@dataclass(frozen=True)
class Grid:
    """Weights that carry sums over one epoch's G grid positions to sums over its n slots, c_p at each of P positions.

    Signals carry the weight 1/c_p of their batch, so y = c_p·x is smooth across batches of unequal size; the weights
    act on y. Slots that drop_last leaves empty hold x = 0 and add nothing to either sum.

    Attributes:
        sizes: (G,) c_p at the grid's positions.
        square: (G,) such that Σ_slots x² = Σ_g square_g·y_g².
        linear: (G,) such that Σ_slots x = Σ_g linear_g·y_g.
        correction: (Σ_g linear_g·y_g)² overstates (Σ_slots x)² by correction·var(y); 0 for regular grids.
        n_positions: P.
    """

    sizes: Floats
    square: Floats
    linear: Floats
    correction: float
    n_positions: int


@dataclass(frozen=True)
class Course:
    """An epoch's signals as one course over positions, the same for all samples, times each sample's size, and a rest.

    A learning rate that falls and a model that learns change all signals alike. That is no chance of a sample's.

    Attributes:
        sizes: (m,) a_i.
        course: (G,) c_p, of length 1.
        rest: (m, G) what a_i·c_p leaves, signals of mean 0 over samples.
        degrees: of freedom of a row of the rest about its mean: of G − 1 the fit takes what of c is not constant,
            Σ_p (c_p − c̄)².
    """

    sizes: Floats
    course: Floats
    rest: Floats
    degrees: float

    @classmethod
    def of(cls, rows: Floats) -> "Course":
        """Fits rows (m, G) by least squares; with fewer than three positions nothing is a course."""
        places = rows.shape[1]
        if places < 3:
            return cls(np.zeros(len(rows)), np.zeros(places), rows, places - 1.0)
        _, vectors = np.linalg.eigh(rows.T @ rows)
        course = vectors[:, -1]
        sizes = rows @ course
        taken = float(((course - course.mean()) ** 2).sum())
        return cls(sizes, course, rows - np.outer(sizes, course), places - 1 - taken)

    @property
    def spared(self) -> float:
        """What squares of the rest about the mean count: degrees of freedom without the fit over those with it."""
        return (self.rest.shape[1] - 1) / self.degrees


def grid_weights(grid: Ints, sampler: ShuffledEpochs, *, positions: Positions) -> Grid:
    """Work out the weights of one epoch's grid.

    Args:
        grid: (G,) ascending positions, 0 to P − 1.
        sampler: the sampler of the run.
        positions: "random": positions drawn uniformly without replacement, Horvitz–Thompson weights P/G, unbiased
            for any signals. "regular": evenly spread positions and signals that change smoothly along the epoch: each
            grid position stands for the positions nearest to it. On evenly spread positions "random" overstates the
            variance of a smooth drift by up to about 1/G.

    Raises:
        InputError: a position outside the epoch, or a single one where the epoch has several.
    """
    one_of(positions, ("random", "regular"), "positions")
    slots = sampler.sizes()
    total = len(slots)
    if grid[0] < 0 or grid[-1] >= total:
        wrong = grid[0] if grid[0] < 0 else grid[-1]
        raise InputError(f"panel position {wrong} is outside 0 to {total - 1}; check batch_size and drop_last")
    if len(grid) < 2 and total > 1:
        raise InputError("the panel has one position in an epoch; evaluate it at two or more")
    if positions == "random":
        share = total / len(grid)
        correction = total**2 * (1 / len(grid) - 1 / total)
        return Grid(slots[grid], share / slots[grid], np.full(len(grid), share), correction, total)
    every = np.arange(total)
    right = np.clip(np.searchsorted(grid, every), 0, len(grid) - 1)
    left = np.clip(right - 1, 0, None)
    to_right, to_left = np.abs(grid[right] - every), np.abs(every - grid[left])
    # A position midway between two grid positions is shared by both.
    weight = np.where(to_right < to_left, 1.0, np.where(to_right > to_left, 0.0, 0.5))
    square, linear = np.zeros(len(grid)), np.zeros(len(grid))
    for side, part in ((right, weight), (left, 1 - weight)):
        square += bin_sums(side, part / slots, len(grid))
        linear += bin_sums(side, part, len(grid))
    return Grid(slots[grid], square, linear, 0.0, total)


@dataclass(frozen=True)
class Panel:
    """Signals of the same samples at every grid position of an epoch, as if each had been in that position's batch.

    Attributes:
        epoch: (k,) integers.
        position: (k,) batch index within the epoch.
        code: (k,) sample codes.
        value: (k,) signal with the weight of that position's batch (1/b), units of the measurement.
    """

    epoch: Ints
    position: Ints
    code: Ints
    value: Floats

    @classmethod
    def from_flat(cls, epoch: ArrayLike, position: ArrayLike, *, code: ArrayLike, value: ArrayLike) -> "Panel":
        """Check flat arrays of one length and sort them by epoch, position and sample.

        Raises:
            InputError: lengths differ, nothing in it, or a value that is not finite.
        """
        columns = (integers(epoch, "epoch"), integers(position, "position"), integers(code, "code"))
        values = np.asarray(value, dtype=np.float64)
        if len({*map(len, columns), values.size}) != 1:
            lengths = ", ".join(str(len(c)) for c in columns)
            raise InputError(
                f"epoch, position, code and value have lengths {lengths} and {values.size}; they must agree"
            )
        if not values.size:
            raise InputError("the noise panel is empty; record one, or estimate the noise from the batch signals")
        check_finite(values, columns[0], columns[2], "epoch")
        order = np.lexsort((columns[2], columns[1], columns[0]))
        return cls(columns[0][order], columns[1][order], columns[2][order], values[order])

    def epochs(self, n_samples: int) -> Iterator[tuple[Ints, Ints, Floats]]:
        """Yield (codes (m,), positions (G,), signals (m, G)) epoch by epoch.

        Raises:
            InputError: an epoch in which some sample misses some position, or a code out of range.
        """
        check_codes(self.code, n_samples)
        starts = np.flatnonzero(np.r_[True, self.epoch[1:] != self.epoch[:-1]])
        for start, stop in zip(starts, [*starts[1:], len(self.epoch)], strict=True):
            place, code = self.position[start:stop], self.code[start:stop]
            grid = place[np.r_[True, place[1:] != place[:-1]]]
            codes = code[: len(code) // len(grid)]
            shape = (len(grid), len(codes))
            complete = len(codes) * len(grid) == len(code) and bool((np.diff(codes) > 0).all())
            if not complete or (code.reshape(shape) != codes).any() or (place.reshape(shape) != grid[:, None]).any():
                raise InputError(
                    f"the noise panel is ragged in epoch {self.epoch[start]}; "
                    "each of its samples needs one signal at each position"
                )
            yield codes, grid, self.value[start:stop].reshape(len(grid), -1).T
