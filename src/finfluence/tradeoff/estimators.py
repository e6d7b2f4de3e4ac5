"""Estimators of Gaussian influence from two samples of measurements: retrained with the samples, and without."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from finfluence.errors import InputError
from finfluence.tradeoff import _checks, ranks
from finfluence.tradeoff.gaussian import GaussianInfluence
from finfluence.tradeoff.laws import NoncentralTLaw, noncentrality
from finfluence.tradeoff.thresholds import REPORTED_LEVEL, ThresholdBounds

Estimator = Literal["gaussian", "rank", "median", "max", "clopper-pearson"]
_Values = NDArray[np.float64]
LEAST_PAIRS = 4
ESTIMATORS: tuple[Estimator, ...] = ("gaussian", "rank", "median", "max", "clopper-pearson")


def compare(
    losses_with: ArrayLike, losses_without: ArrayLike, estimator: Estimator = "gaussian", *, paired: bool = False
) -> GaussianInfluence:
    """Return the Gaussian influence that two samples of measurements show.

    Args:
        losses_with: (n_with,) measurements of models trained with the samples in question, the sample of P.
        losses_without: (n_without,) measurements of models trained without them, the sample of Q.
        estimator:
            "gaussian": mean difference over pooled standard deviation, made exactly unbiased (Hedges 1981), with the
            noncentral-t interval; assumes two normal laws with one variance.
            "rank": sqrt(2) Phi^-1(AUC); unchanged by any increasing function of the measurement.
            "median": median over thresholds of mu_tau = Phi^-1(1 - alpha_tau) - Phi^-1(beta_tau).
            "max": f-INE's rule, the mu_tau of largest magnitude. Biased upward: at mu = 0 with 200 runs a side its mean
            magnitude is 0.56. Its interval and p-value allow for the bias, so the interval may lie below the estimate.
            "clopper-pearson": a lower bound on |mu| (95 %, both directions) valid at any number of runs, 0 if the data
            exclude neither sign; `interval` gives the one-sided bounds at other levels.
            The intervals of "rank", "median" and "max" come from a parametric bootstrap of G_mu (`ranks.RankLaw`).
        paired: whether the k-th measurements of both samples belong together, as those of two trainings with one batch
            order do. The "gaussian" estimator then leaves what pairs have in common out of its error (see
            `gaussian_estimates`); the others have no use for it, and their intervals are wider than they need be.

    Returns:
        mu with its standard error, interval and p-value. mu > 0: removing the samples raises the measurement.

    Raises:
        InputError: on fewer than three values a sample (four pairs), values that are not finite, no variation between
            runs, an unknown estimator, or pairs for another one than "gaussian".
    """
    _checks.choice("estimator", estimator, ESTIMATORS)
    if paired and estimator != "gaussian":
        raise InputError(f"the {estimator} estimator takes no pairs; leave out paired, or choose gaussian")
    p, q = _checks.sample("losses_with", losses_with), _checks.sample("losses_without", losses_without)
    if estimator == "gaussian":
        estimates = gaussian_estimates(p, q, paired=paired)
        law = NoncentralTLaw(float(estimates.t), float(estimates.df), float(estimates.scale), estimates.test_df)
        return GaussianInfluence(float(estimates.mu), float(estimates.se), law=law)
    if np.ptp(p) == 0 and np.ptp(q) == 0:
        raise _no_variation()
    if estimator == "clopper-pearson":
        bounds = ThresholdBounds.of(p, q)
        return GaussianInfluence(bounds.bound(REPORTED_LEVEL), bounds.se(), law=bounds)
    if estimator == "rank":
        mu = float(ranks.mu_from_superiority(ranks.superiority(p, q), p.size, q.size))
    else:
        below_p, below_q, _ = ranks.pooled_counts(p, q)
        mus = ranks.threshold_mus(below_p, below_q, p.size, q.size)
        mu = float(ranks.largest(mus) if estimator == "max" else ranks.middle(mus))
    law = ranks.RankLaw(estimator, mu, p.size, q.size)
    return GaussianInfluence(mu, law.se, law=law)


@dataclass(frozen=True, eq=False)
class GaussianEstimates:
    """The gaussian estimator for many pairs of samples at once.

    Attributes:
        mu: (...,) unbiased estimates.
        se: (...,) their standard errors.
        t: (...,) t statistics of the mean differences.
        df: () or (...,) degrees of freedom of the intervals.
        scale: () or (...,) standard error of the mean difference in standard deviations, so that t's noncentrality is
            mu / scale.
        test_df: degrees of freedom of t where mu is 0.
    """

    mu: NDArray[np.float64]
    se: NDArray[np.float64]
    t: NDArray[np.float64]
    df: NDArray[np.float64]
    scale: NDArray[np.float64]
    test_df: int

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return lower and upper ends of the noncentral-t intervals, each (...,)."""
        level = _checks.probability("level", level)
        low = noncentrality(0.5 + level / 2, self.df, self.t) * self.scale
        return low, noncentrality(0.5 - level / 2, self.df, self.t) * self.scale

    @property
    def p_value(self) -> NDArray[np.float64]:
        """Two-sided p-values of mu = 0 (Student's t test), (...,)."""
        return np.asarray(2 * special.stdtr(self.test_df, -np.abs(self.t)))


def gaussian_estimates(losses_with: ArrayLike, losses_without: ArrayLike, *, paired: bool = False) -> GaussianEstimates:
    """Return the gaussian estimator for samples along the last axis; the other axes broadcast.

    d = (mean_Q - mean_P) / pooled sd overestimates |mu| at few runs (by 2.5 % at 16 an arm); times
    J = Gamma(df/2) / (sqrt(df/2) Gamma((df-1)/2)) it is exactly unbiased under normality (Hedges 1981, eq. 6a).
    The interval does not depend on this choice.

    !!! Pairs
        Let rho be the correlation in R pairs. The mean difference has the standard error kappa sd, kappa^2 = 2 (1 -
        rho)/R instead of 2/R, and the pooled variance nu = 2 (R - 1)/(1 + rho^2) degrees of freedom instead of
        2 (R - 1) (Satterthwaite). So t = d/kappa is Student's with R - 1 degrees of freedom where mu is 0, and where it
        is large what counts is the error of sd; the interval takes degrees between R - 1 and nu in the shares that the
        two errors have of the estimate's, kappa^2 and d^2/(2 nu). It covers 93 to 97 % at 95 % (simulated: 4 to 64
        pairs, rho from 0 to .98, mu up to 8).

    Args:
        losses_with: (..., n_with) measurements of P.
        losses_without: (..., n_without) measurements of Q.
        paired: whether the k-th measurements of both belong together.

    Returns:
        Estimates in the broadcast shape of the leading axes.

    Raises:
        InputError: on fewer than three values a sample (four pairs), samples of unequal length that are to be paired,
            values that are not finite, or no variation between runs.
    """
    p, q = _checks.measurements("losses_with", losses_with), _checks.measurements("losses_without", losses_without)
    try:
        np.broadcast_shapes(p.shape[:-1], q.shape[:-1])
    except ValueError:
        raise InputError(
            f"losses_with has shape {p.shape} and losses_without {q.shape}; all axes but the last must broadcast."
        ) from None
    n, m = p.shape[-1], q.shape[-1]
    if paired and (n != m or n < LEAST_PAIRS):
        raise InputError(f"pairs need as many values with as without, at least {LEAST_PAIRS}; got {n} and {m}.")
    squares = n * p.var(axis=-1) + m * q.var(axis=-1)
    sd = np.sqrt(squares / (n + m - 2))
    size = np.maximum(np.abs(p).max(axis=-1), np.abs(q).max(axis=-1))
    # A sd at the rounding error of the values is no variation, only noise of the arithmetic.
    rounding = 8 * np.finfo(np.float64).eps * size
    if np.any(sd <= rounding):
        raise _no_variation()
    d = (q.mean(axis=-1) - p.mean(axis=-1)) / sd
    freedom, scale = np.asarray(float(n + m - 2)), np.sqrt(np.asarray(1 / n + 1 / m))
    df, test_df = freedom, n + m - 2
    if paired:
        freedom, scale = _of_pairs(p, q, sd=sd, rounding=rounding)
        share, test_df = scale**2 / (scale**2 + d**2 / (2 * freedom)), n - 1
        df = share * test_df + (1 - share) * freedom
    correction = np.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / np.sqrt(freedom / 2)
    mu = correction * d
    # Variance of the noncentral t at noncentrality mu / scale (Johnson, Kotz, Balakrishnan 1995, eq. 31.15), times J^2.
    variance = correction**2 * freedom / (freedom - 2) * (scale**2 + mu**2) - mu**2
    return GaussianEstimates(mu, np.sqrt(variance), d / scale, df, scale, test_df)


def _of_pairs(p: _Values, q: _Values, *, sd: _Values, rounding: _Values) -> tuple[_Values, _Values]:
    """Degrees of freedom of the variance of pairs, and the error of their mean difference over sd, each (...,)."""
    runs = p.shape[-1]
    apart = np.maximum((q - p).std(axis=-1, ddof=1), rounding) / sd
    correlation = 1 - apart**2 / 2
    return 2 * (runs - 1) / (1 + correlation**2), apart / np.sqrt(runs)


def _no_variation() -> InputError:
    return InputError(
        "the measurements do not vary between runs (standard deviation 0), so mu is undefined; "
        "give every run its own seed, or compare the two numbers directly."
    )
