"""Influence relative to the length of a sample's gradient: what is about the query, not what weighs much everywhere."""

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, bin_sums


def squared_lengths(code: ArrayLike, value: ArrayLike, *, period: ArrayLike, n_samples: int) -> Floats:
    """Return each sample's squared length of gradient from its self-signals, as a multiple of the average sample's.

    A self-signal is lr·‖∇ℓ_i‖² in the optimizer's metric, up to its sign. Learning rate and metric change over a run by
    orders of magnitude, so every period, in which each sample was looked at, counts by what is relative in it.

    Args:
        code: (n_signals,) sample codes in 0 … n_samples − 1.
        value: (n_signals,) self-signals.
        period: (n_signals,) integers ≥ 0, e.g. the step where every step has all samples, else the epoch.
        n_samples: number of samples, n.

    Returns:
        (n,) sums over periods; 0 for samples without signals.
    """
    codes, periods = np.asarray(code, dtype=np.int64), np.asarray(period, dtype=np.int64)
    sizes = np.abs(np.asarray(value, dtype=np.float64))
    _, place = np.unique(periods, return_inverse=True)
    means = np.bincount(place, sizes) / np.maximum(np.bincount(place), 1)
    average = means[place]
    return bin_sums(codes, np.divide(sizes, average, out=np.zeros_like(sizes), where=average > 0), n_samples)


def relative_influence(mu: ArrayLike, own: ArrayLike) -> Floats:
    """Return μ as it would be if every sample had a gradient of the median length.

    A sample with a long gradient (a long text, an outlier) moves every measurement, and comes up in the search for what
    moves one. Barshan, Brunet and Dziugaite (2020, arXiv 2003.11630) look for the largest influence among samples that
    change the model equally, which divides it by the root of the self-influence s_i, the squared length of the gradient
    in the optimizer's metric:

        ρ_i = μ_i · sqrt(median(s) / s_i).

    It ranks; unlike μ it is not what retraining without the sample measures.

    Args:
        mu: (n,) influence on the query.
        own: (n,) self-influence s_i ≥ 0, in any unit, see `squared_lengths`.

    Returns:
        (n,) in the unit of μ; NaN where μ is not known or s_i is not positive.

    Raises:
        InputError: different lengths, or no positive self-influence.
    """
    values, squares = np.asarray(mu, dtype=np.float64), np.asarray(own, dtype=np.float64)
    if values.ndim != 1 or values.shape != squares.shape:
        raise InputError(f"mu has shape {values.shape} and own {squares.shape}; give one of each a sample")
    positive = squares > 0
    if not positive.any():
        raise InputError("no sample has a positive self-influence, so no gradient has a length")
    median = float(np.median(squares[positive]))
    found = np.full(values.shape, np.nan)
    found[positive] = values[positive] * np.sqrt(median / squares[positive])
    return found
