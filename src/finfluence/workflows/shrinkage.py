"""Unbiased again after choosing: empirical-Bayes shrinkage of estimates among which the most extreme are picked.

Rows that are chosen because their estimates are the lowest are, on average, not as low as estimated (the winner's
curse), and the sum of their estimates is too extreme. The posterior mean given the estimate does not depend on why the
row was chosen (Efron 2011, "Tweedie's formula and selection bias"), so the sum of posterior means is what a cut should
promise. The prior is what all estimates of the run have in common, fitted by maximum likelihood.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, ndtr

from finfluence.errors import InputError

Floats = NDArray[np.float64]

# Estimates that the prior is fitted to at most; more add nothing to its precision that a reader would see.
_FITTED = 4000
_LEAST_FOR_SHAPE = 50
_FOLDS = 8
_ITERATIONS = 500
# Rows without influence that the prior is fitted with besides the run's own: where nothing is to be found, the fit
# would otherwise find a little in the noise.
_NULL_ROWS = 2.0
# The jackknife understates the error of weights that lie on the edge of what they can be; the factor on its variance
# comes from simulated coverage (tests/workflows).
_PRIOR_FACTOR = 2.0


@dataclass(frozen=True)
class Prior:
    """A mixture of normals: how true influences are distributed over a run's rows.

    Attributes:
        weights: (components,) adding up to 1.
        means: (components,).
        deviations: (components,) standard deviations; may be 0.
    """

    weights: Floats
    means: Floats
    deviations: Floats

    def responsibilities(self, mu: Floats, se: Floats) -> Floats:
        """(n, components) posterior probability of each component given each estimate."""
        joint = _log_density(mu, se, means=self.means, deviations=self.deviations) + np.log(
            np.maximum(self.weights, 1e-300)
        )
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


@dataclass(frozen=True)
class Shrunk:
    """True influences given their estimates.

    Attributes:
        mean: (n,) posterior means.
        variance: (n,) posterior variances.
        below: (n,) posterior probability that the true influence is below 0.
        above: (n,) that it is above 0. Together less than 1, where the prior has rows without influence.
        folds: (folds, n) posterior means under priors fitted without one fold each, for the error of the prior.
    """

    mean: Floats
    variance: Floats
    below: Floats
    above: Floats
    folds: Floats

    def sum_error(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> float:
        """Standard error of the sum of the chosen rows' influences: their own, and the prior's by deleting groups."""
        sums = self.folds[:, chosen].sum(axis=1)
        prior = (len(sums) - 1) / len(sums) * float(((sums - sums.mean()) ** 2).sum()) if len(sums) else 0.0
        return float(np.sqrt(self.variance[chosen].sum() + _PRIOR_FACTOR * prior))


def shrink(mu: ArrayLike, se: ArrayLike) -> Shrunk:
    """Posterior of the true influences, given estimates with normal errors of known size.

    The prior is a mixture of normals on a fixed grid of means and deviations whose weights maximise the likelihood by
    EM (Stephens 2017, "False discovery rates: a new deal"; Koenker and Mizera 2014 for the grid of means). Fewer than
    50 estimates get a single normal prior (Efron and Morris 1973).

    Args:
        mu: (n,) estimates; NaN stays NaN and counts for nothing.
        se: (n,) standard errors, positive.

    Raises:
        InputError: unequal lengths, no estimate, or a standard error that is not positive.
    """
    mus, errors = np.asarray(mu, dtype=np.float64), np.asarray(se, dtype=np.float64)
    if mus.shape != errors.shape or mus.ndim != 1:
        raise InputError(f"mu and se have shapes {mus.shape} and {errors.shape}; give one vector each")
    known = np.isfinite(mus) & np.isfinite(errors)
    if not known.any():
        raise InputError("there is no estimate to shrink")
    if not (errors[known] > 0).all():
        raise InputError("a standard error is not positive; shrinkage needs the size of every error")
    # a report, a cut and its verification ask for the same posterior one after the other
    found = _shrink(mus[known].tobytes(), errors[known].tobytes())
    columns = (found.mean, found.variance, found.below, found.above, found.folds)
    return Shrunk(*(_spread_out(values, known) for values in columns))


def _spread_out(values: Floats, known: NDArray[np.bool_]) -> Floats:
    full = np.full((*values.shape[:-1], len(known)), np.nan)
    full[..., known] = values
    return full


@functools.lru_cache(maxsize=8)
def _shrink(mu: bytes, se: bytes) -> Shrunk:
    m, s = np.frombuffer(mu), np.frombuffer(se)
    means, deviations = _grid(m, s)
    rows = _evenly(m)
    log_density = _log_density(m[rows], s[rows], means=means, deviations=deviations)
    null = int(np.argmin(np.abs(means) + deviations))
    prior = _single(m, s) if len(m) < _LEAST_FOR_SHAPE else Prior(_weights(log_density, null), means, deviations)
    mean, variance, below, above = _posterior(prior, m, s)
    folds = np.empty((0, len(m)))
    if len(m) >= 3:
        folds = np.empty((_FOLDS, len(m)))
        for fold in range(_FOLDS):
            # rows are in the order of their estimates, so every fold covers the whole range
            kept = np.arange(len(rows)) % _FOLDS != fold
            if len(m) < _LEAST_FOR_SHAPE:
                other = _single(m[rows[kept]], s[rows[kept]])
            else:
                other = Prior(_weights(log_density[kept], null), means, deviations)
            folds[fold] = _posterior(other, m, s)[0]
    return Shrunk(mean, variance, below, above, folds)


def _evenly(mu: Floats) -> NDArray[np.int64]:
    """Rows to fit the prior to, in the order of their estimates."""
    order = np.argsort(mu, kind="stable")
    if len(order) <= _FITTED:
        return order
    return order[np.linspace(0, len(order) - 1, _FITTED).round().astype(np.int64)]


def _grid(mu: Floats, se: Floats) -> tuple[Floats, Floats]:
    """Means and deviations of the components: narrow ones around 0, as many as one error each over the whole range."""
    unit = float(np.median(se))
    step = max(0.75 * unit, float(np.ptp(mu)) / 80)
    wide = np.arange(min(float(mu.min()), 0.0), max(float(mu.max()), 0.0) + step, step)
    scales = unit * 2.0 ** np.arange(-4, 4)
    shifts = unit * np.array([-0.5, -0.25, 0.25, 0.5])
    means = np.concatenate([wide, np.zeros(len(scales) + 1), shifts])
    deviations = np.concatenate([np.full(len(wide), 0.6 * step), [0.0], scales, np.full(len(shifts), 0.125 * unit)])
    return means, deviations


def _log_density(mu: Floats, se: Floats, *, means: Floats, deviations: Floats) -> Floats:
    variance = se[:, None] ** 2 + deviations**2
    return -0.5 * ((mu[:, None] - means) ** 2 / variance + np.log(2 * np.pi * variance))


def _weights(log_density: Floats, null: int) -> Floats:
    """Weights of the components by EM, with a little weight added to the one of no influence at all."""
    likelihood = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    rows, count = likelihood.shape
    weights, extra = np.full(count, 1 / count), np.zeros(count)
    extra[null] = _NULL_ROWS
    for _ in range(_ITERATIONS):
        scale = 1.0 / np.maximum(likelihood @ weights, 1e-300)
        weights = (weights * (scale @ likelihood) + extra) / (rows + _NULL_ROWS)
    return weights / weights.sum()


def _single(mu: Floats, se: Floats) -> Prior:
    """One normal, its mean and variance by EM of the marginal likelihood."""
    centre, spread = float(np.average(mu, weights=se**-2)), float(np.var(mu))
    for _ in range(_ITERATIONS):
        share = spread / (spread + se**2)
        mean = centre + share * (mu - centre)
        centre, spread = float(mean.mean()), float(((mean - mean.mean()) ** 2 + share * se**2).mean())
    return Prior(np.ones(1), np.array([centre]), np.array([np.sqrt(spread)]))


def _posterior(prior: Prior, mu: Floats, se: Floats, chunk: int = 4096) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean, variance, and probability below and above 0."""
    mean, variance, below, above = (np.empty(len(mu)) for _ in range(4))
    for start in range(0, len(mu), chunk):
        part = slice(start, start + chunk)
        m, s = mu[part], se[part]
        weight = prior.responsibilities(m, s)
        share = prior.deviations**2 / (prior.deviations**2 + s[:, None] ** 2)
        means = prior.means + share * (m[:, None] - prior.means)
        spread = share * s[:, None] ** 2
        mean[part] = (weight * means).sum(axis=1)
        variance[part] = (weight * (spread + (means - mean[part][:, None]) ** 2)).sum(axis=1)
        # a component without spread at 0 is neither below nor above
        scale = np.sqrt(np.maximum(spread, 1e-300))
        for sign, probability in ((-1.0, below), (1.0, above)):
            z = np.where(spread > 0, sign * means / scale, np.where(sign * means > 0, np.inf, -np.inf))
            probability[part] = (weight * ndtr(z)).sum(axis=1)
    return mean, variance, below, above
