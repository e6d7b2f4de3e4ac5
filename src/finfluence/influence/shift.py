"""From per-sample totals and noise to μ and its standard error, for samples and any subsets, on arrays."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, Ints, one_of
from finfluence.influence.noise import Noise
from finfluence.influence.subsets import PackedSubsets
from finfluence.influence.totals import SampleTotals

Budget = Literal["steps", "epochs"]
Replacement = Literal["small", "exact"]


@dataclass(frozen=True)
class Removal:
    """What training without the subset is compared with.

    Attributes:
        budget: "steps": retraining takes as many steps as before, so that average samples take the removed ones' place
            and signals are centred. "epochs": it takes as many epochs, so fewer steps, and signals are not centred;
            also right for Poisson sampling with a fixed rate and fixed weights.
        replacement: under equal steps, "small" is the limit of a small subset, Δ_S = −Σ_{i∈S} (centred)_i. "exact"
            counts that the places fall to the n − s remaining samples only. With x̄ the mean over the n samples at a
            position and x̄_R over the remaining, each of its b places changes by x̄_R − x̄ = −Σ_{i∈S} (x_i − x̄)/(n −
            s), while a place holds i with probability 1/n, so Δ_S = −n/(n − s)·Σ_{i∈S} (centred)_i; with
            centre="others" the sum is n/(n − 1) larger, so the factor is (n − 1)/(n − s), which is 1 for a single
            sample.
    """

    budget: Budget = "steps"
    replacement: Replacement = "small"

    def __post_init__(self) -> None:
        one_of(self.budget, ("steps", "epochs"), "budget")
        one_of(self.replacement, ("small", "exact"), "replacement")

    def factor(self, sizes: Ints, totals: SampleTotals) -> Floats:
        """Return what the sum over each subset is multiplied by, (k,)."""
        n = totals.n_samples
        if self.budget == "epochs" or self.replacement == "small":
            return np.ones(len(sizes))
        return (n if totals.centre == "batch" else n - 1) / (n - sizes)

    def noise_ratio(
        self, sizes: Ints, totals: SampleTotals, *, noise: Noise, sensitivity: Floats | float = 1.0
    ) -> Floats:
        """Return the unit of μ over the noise σ of the run, (k,).

        μ counts in the pooled standard deviation of training with and without S. Under "exact" replacement and
        shuffling the latter has the same number of batches, each n/(n − s) times smaller, and so n/(n − s) times the
        variance; pooled, σ²·(1 + n/(n − s))/2. Draws with replacement keep the batch size, and their noise.

        Args:
            sizes: (k,) numbers of samples.
            totals: of the n samples.
            noise: of the run.
            sensitivity: (k,) how much more the measurement without S moves with the parameters than with S, where that
                is known: the noise without S is so many times larger.
        """
        shuffled = noise.method in ("shuffled", "successive")
        smaller = self.budget == "steps" and self.replacement == "exact" and shuffled
        growth = totals.n_samples / (totals.n_samples - sizes) if smaller else np.ones(len(sizes))
        return np.sqrt((1 + np.square(sensitivity) * growth) / 2)


@dataclass(frozen=True)
class DerivativeError:
    """What the derivative of a run along its own path gets wrong, beside where the run happened to put its samples.

    Another order of the data gives another path, with other sensitivities, and removing samples is a finite change. One
    run shows neither; these are constants of the kind of training, set against retraining.

    Attributes:
        path: of another path, as a multiple of the error of placement where samples do not follow one course
            (`Noise.own_course`).
        each: relative error of every sample's μ, one sample's independent of another's: a subset has the root of the
            sum of their squares.
        joint: relative error of the μ of any subset.
    """

    path: float = 0.0
    each: float = 0.0
    joint: float = 0.0

    def __post_init__(self) -> None:
        if not all(part >= 0 for part in (self.path, self.each, self.joint)):
            raise InputError(f"{self} has a part that is not a number from 0 on")

    def times(self, factor: float) -> "DerivativeError":
        """All parts so many times.

        Raises:
            InputError: a negative factor.
        """
        return DerivativeError(self.path * factor, self.each * factor, self.joint * factor)

    @property
    def of_one(self) -> float:
        """Relative error of the μ of a single sample."""
        return math.hypot(self.each, self.joint)


NO_ERROR = DerivativeError()


@dataclass(frozen=True)
class Estimates:
    """μ and standard error of several subsets.

    Attributes:
        mu: (k,) in noise units; μ > 0: the samples support the measured behaviour.
        se: (k,) standard errors.
        size: (k,) numbers of samples.
        null: (k,) standard errors where μ is 0, for tests of that: without what is relative to μ. None: `se`.
        shared: (k,) the part of `se` that other runs of the training have in common with this one. None: nothing.
        unit: (k,) what μ counts in, in units of the measurement. None: not known.
    """

    mu: Floats
    se: Floats
    size: Ints
    null: Floats | None = None
    shared: Floats | None = None
    unit: Floats | None = None


def sample_estimates(
    totals: SampleTotals, noise: Noise, *, removal: Removal | None = None, error: DerivativeError | None = None
) -> Estimates:
    """Estimate μ and se of every single sample.

    Args:
        totals: of n samples.
        noise: of the run.
        removal: what is compared; by default equal steps, small subsets.
        error: see `subset_estimates`.

    Returns:
        Estimates of n rows in code order; NaN for samples that no batch held.
    """
    every = np.arange(totals.n_samples)
    packed = PackedSubsets([], every, every, np.ones(totals.n_samples, dtype=np.int64))
    found = subset_estimates(totals, noise, packed=packed, removal=removal, error=error)
    unseen = totals.visits == 0

    def seen(values: Floats | None) -> Floats | None:
        return None if values is None else np.where(unseen, np.nan, values)

    return replace(found, **{name: seen(getattr(found, name)) for name in ("mu", "se", "null", "shared")})


def subset_estimates(
    totals: SampleTotals,
    noise: Noise,
    *,
    packed: PackedSubsets,
    removal: Removal | None = None,
    error: DerivativeError | None = None,
) -> Estimates:
    """Estimate μ_S = Δ_S/σ and its standard error for every packed subset.

    Δ_S = −Σ_{i∈S} (centred)_i (see `Removal`). Its standard error comes from the places in which the run happened to
    put S's samples. With f = s/n, V_S = Σ_{i∈S} v_i, V = σ², τ² = noise.between and b the batch size,

        var Δ_S = k·[(1 − f)²·V_S + f²·(V − V_S) + s·(1 − f)·τ²/b],

    where the f terms arise because the samples of S are also centred on one another (the sum over all samples is 0),
    τ²/b is the noise of the batch mean, and k = 1 − 1/b for centre="batch" or its inverse for "others". For small S and
    large b this is Σ_{i∈S} v_i. Uncentred (budget="epochs"): V_S + s·(1 − f)·noise.drift. Full signals: the error of
    the mean over the grid, in part relative to μ (`SampleTotals.from_panel`). The noise's own relative error ρ (of the
    variance) adds (μ·ρ/2)², by the delta method.

    !!! The derivative's own error
        All this is the error of the shift along the run's own path. Let c, ρ_e and ρ_j be `error`'s path, each and
        joint, and P_S the variance of placement where samples do not follow one course (`Noise.own_course`). Then

            se² = (var Δ_S + c²·P_S)/σ² + ρ_e²·Σ_{i∈S} μ_i² + ρ_j²·μ_S²,

        the sum less what S shares with the rest, as above. What is relative vanishes where μ_S = 0, and is left out of
        the error that tests of that take: ρ_j always, ρ_e for single samples.

    Args:
        totals: of n samples.
        noise: of the run.
        packed: subsets of codes below n.
        removal: what is compared; by default equal steps, small subsets.
        error: of the derivative; none by default: the standard error is conditional on the path, and of first order.

    Raises:
        InputError: zero noise (training does not depend on the order), or noise and totals of different samples.
    """
    removal, error = removal or Removal(), error or NO_ERROR
    n = totals.n_samples
    if not noise.variance > 0:
        raise InputError("the noise is zero: training does not depend on the order of its data, so μ is not defined")
    if noise.per_sample is not None and len(noise.per_sample) != n:
        raise InputError(f"the noise has {len(noise.per_sample)} samples and the totals {n}; take both from one run")
    sigma = noise.sigma
    steps = removal.budget == "steps"
    factor = removal.factor(packed.sizes, totals)
    shift = -factor * packed.sums(totals.centred if steps else totals.total)
    known = totals.centred_variance if steps else totals.total_variance
    along = _placement(totals, noise, packed=packed, steps=steps) if known is None else packed.sums(known)
    path = _placement(totals, noise.on_own_course(), packed=packed, steps=steps) if error.path else 0.0
    variance = factor**2 * (along + error.path**2 * path)
    unit = sigma * removal.noise_ratio(packed.sizes, totals, noise=noise)
    mu = shift / unit
    own = variance / unit**2 + (mu * noise.relative_error / 2) ** 2
    each = (error.each * factor / unit) ** 2 * _squares(totals, packed, steps=steps)
    relative = (error.joint * mu) ** 2
    scale = (totals.common_error * mu) ** 2 if steps else 0.0
    return Estimates(
        mu,
        np.sqrt(own + each + relative + scale),
        packed.sizes,
        null=np.sqrt(own + np.where(packed.sizes > 1, each, 0.0)),
        shared=np.sqrt(each + relative),
        unit=unit,
    )


def _squares(totals: SampleTotals, packed: PackedSubsets, *, steps: bool) -> Floats:
    """Sum of the squared shifts of each subset's samples, (k,), less what it shares with the rest."""
    f = packed.sizes / totals.n_samples
    squares = np.square(totals.centred if steps else totals.total)
    own = packed.sums(squares)
    return (1 - f) ** 2 * own + f**2 * (squares.sum() - own)


def _placement(totals: SampleTotals, noise: Noise, *, packed: PackedSubsets, steps: bool) -> Floats:
    """Variance of the plain shift of each subset, (k,), from where batches happened to hold its samples."""
    size = packed.sizes.astype(np.float64)
    f = size / totals.n_samples
    own = noise.variance * f
    if noise.per_sample is not None:
        own = own + (packed.sums(noise.per_sample) - own) / (1 + noise.credibility / size)
    if not steps:
        return own + size * (1 - f) * noise.drift
    b = totals.batch
    rest = np.maximum(noise.variance - own, 0.0)
    placed = (1 - f) ** 2 * own + f**2 * rest + size * (1 - f) * noise.between / b
    return placed * (1 - 1 / b if totals.centre == "batch" else 1 / (1 - 1 / b))
