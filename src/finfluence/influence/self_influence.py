"""Self-influence: how strongly each sample's own share of training moves the loss on that very sample."""

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import bin_sums, moderate, one_of
from finfluence.influence.metadata import attach
from finfluence.influence.noise import successive_variances
from finfluence.influence.subsets import SampleIndex
from finfluence.influence.table import CONDITION, Reporting, report


def self_influence(
    index: SampleIndex,
    step: ArrayLike,
    *,
    code: ArrayLike,
    value: ArrayLike,
    reference: Literal["zero", "median"] = "zero",
    scale: Literal["pooled", "own"] = "pooled",
    reporting: Reporting | None = None,
) -> pl.DataFrame:
    """Score every sample by the signal of its own training on its own loss; the mislabelled come first (largest μ).

    With x_{i,t} the signal of sample i on its own loss, Δ_i = −Σ_t x_{i,t}: what i's own share of training took off its
    loss. It is not centred: how much average samples in i's place would have helped i is not recorded. The noise of i's
    loss over reruns would need every other sample's signal on i, which self-signals do not hold either. The unit is
    therefore the noise of the contribution itself, v_i = visits × half the mean squared difference of successive
    signals (von Neumann, 1941),

        μ_i = (Δ_i − reference)/σ,    se_i = sqrt(v_i)/σ.

    So this μ ranks samples and says which contributions stand out of their own fluctuation. It is not the μ that
    retraining without i would give.

    Args:
        index: ids of the n samples.
        step: (n_signals,) integers.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals of each sample on itself, units of the measurement.
        reference: what Δ is compared with: "zero", or the "median" sample, which makes the p-values a test for standing
            out. Under SGD live self-signals are squared gradient norms, all of one sign, so there "zero" is rejected
            for nearly all samples.
        scale: σ² is the mean of v over samples ("pooled": ranks as Δ does) or each sample's v_i ("own": a t-statistic).
        reporting: level, alternative and correction.

    Returns:
        Frame with the columns sample, mu, se, ci_low, ci_high, p_value, q_value in code order; null for samples without
        signals. With one visit a sample there is no noise to see: σ is the standard deviation of Δ over samples, se is
        null.

    Raises:
        InputError: see `signals`; signals without any variation.
    """
    one_of(reference, ("zero", "median"), "reference")
    one_of(scale, ("pooled", "own"), "scale")
    n = len(index)
    own, pairs, visits = successive_variances(step, code, value=value, n_samples=n)
    codes = np.asarray(code, dtype=np.int64)
    delta = -bin_sums(codes, np.asarray(value, dtype=np.float64), n)
    seen = visits > 0
    if reference == "median":
        delta = delta - np.median(delta[seen])
    if pairs.any():
        repeats = float(pairs[pairs > 0].mean())
        variance = np.zeros(n)
        # Degrees of freedom of a von Neumann estimate from k differences: 2k²/(3k − 1).
        variance[seen] = moderate((own * visits)[seen], 2 * repeats**2 / (3 * repeats - 1))
        sigma = np.sqrt(np.full(n, variance[seen].mean()) if scale == "pooled" else variance)
        se = np.sqrt(variance)
        unit = "standard deviations of a sample's own contribution"
    else:
        sigma = np.full(n, delta[seen].std())
        se = np.full(n, np.nan)
        unit = "standard deviations over samples (one visit each: no noise to see)"
    if not (sigma[seen] > 0).all():
        raise InputError(
            "some self-influence signals do not vary at all, so they have no unit; use scale='pooled' or more steps"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        mu, se = np.where(seen, delta / sigma, np.nan), np.where(seen, se / sigma, np.nan)
    frame = pl.DataFrame({"sample": index.ids, **report(mu, se, reporting=reporting)})
    return attach(frame, estimator="self", reference=reference, scale=scale, unit=unit, condition=CONDITION)
