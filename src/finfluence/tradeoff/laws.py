"""How far an estimate of mu can be trusted: intervals and p-values, one small frozen object a method.

An estimator hands its law to `GaussianInfluence`, which asks it two things: an interval at a level, and the p-value
of mu = 0. The law of the rank-based estimators is in `ranks`, that of the Clopper-Pearson bounds in `thresholds`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from finfluence.errors import InputError
from finfluence.tradeoff import _checks

Alternative = Literal["two-sided", "supporting", "harmful"]
ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "supporting", "harmful")


class SamplingLaw(Protocol):
    """What an estimator knows about its own error."""

    def interval(self, level: float) -> tuple[float, float]:
        """Return the ends of a confidence interval of mu at `level`."""
        ...

    def p(self, alternative: Alternative) -> float:
        """Return the p-value of H0 against mu != 0 ("two-sided"), mu > 0 ("supporting") or mu < 0 ("harmful")."""
        ...


def tails(supporting: float, harmful: float, alternative: Alternative) -> float:
    """Return the p-value that `alternative` asks for, given the two one-sided ones."""
    if alternative == "supporting":
        return float(supporting)
    if alternative == "harmful":
        return float(harmful)
    return float(min(1.0, 2.0 * min(supporting, harmful)))


@dataclass(frozen=True)
class NormalLaw:
    """The estimate is normal around mu with a known standard error (`se` = 0: mu is known exactly)."""

    mu: float
    se: float

    def __post_init__(self) -> None:
        _checks.finite("mu", self.mu)
        if _checks.finite("se", self.se) < 0:
            raise InputError(f"se is {self.se:g}; give a standard error that is zero or positive.")

    def interval(self, level: float) -> tuple[float, float]:
        """Return mu plus and minus z times se."""
        half = float(special.ndtri(0.5 + level / 2)) * self.se
        return self.mu - half, self.mu + half

    def p(self, alternative: Alternative) -> float:
        """Return the p-value of z = mu / se; with se = 0 there is no doubt, so it is 0 or 1."""
        if self.se == 0:
            return tails(float(self.mu <= 0), float(self.mu >= 0), alternative)
        z = self.mu / self.se
        return tails(float(special.ndtr(-z)), float(special.ndtr(z)), alternative)


@dataclass(frozen=True)
class NoncentralTLaw:
    """A t statistic of normal measurements.

    t = (mean_Q - mean_P) / (sd * scale) is noncentral t with `df` degrees of freedom and noncentrality mu / scale.
    Of two independent samples with a common variance scale is sqrt(1/n_P + 1/n_Q), and this is exact at any number of
    runs; of pairs see `estimators.gaussian_estimates`.

    Attributes:
        t: the statistic.
        df: degrees of freedom, for the interval.
        scale: standard error of the mean difference, in standard deviations of a measurement.
        test_df: degrees of freedom where mu is 0, for the p-value; `df` by default.
    """

    t: float
    df: float
    scale: float
    test_df: float | None = None

    def interval(self, level: float) -> tuple[float, float]:
        """Return the values of mu whose noncentral t has the observed t at its two tails (Hedges and Olkin 1985)."""
        low, high = noncentrality([0.5 + level / 2, 0.5 - level / 2], self.df, self.t) * self.scale
        return float(low), float(high)

    def p(self, alternative: Alternative) -> float:
        """Return the p-value of Student's t test."""
        df = self.df if self.test_df is None else self.test_df
        below, above = float(special.stdtr(df, self.t)), float(special.stdtr(df, -self.t))
        return tails(above, below, alternative)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_REACH = 9.0  # standard deviations that an integral covers on each side
_WIDE = 3.0  # spread of t's denominator, times t, above which the integral runs over t's numerator instead
_Values = NDArray[np.float64]
_Distribution = Callable[[_Values, _Values], tuple[_Values, _Values]]


def noncentrality(p: ArrayLike, df: ArrayLike, t: ArrayLike) -> _Values:
    """Return the noncentrality delta for which P(T <= t) = p, elementwise.

    T = (Z + delta) / s with Z normal and s = chi_df / sqrt(df). P(T <= t) is E Phi(t s - delta) over s, or, where t s
    varies so much that Phi is nearly a step, E P(s >= (Z + delta) / t) over Z: either way a Gauss-Legendre sum of a
    smooth function, and the root is a Newton iteration on the probit scale, where the function is nearly linear.
    (scipy.special.nctdtrinc is off in the second digit for small t in SciPy 1.17.)

    Args:
        p: probabilities in (0, 1), broadcast with df and t.
        df: degrees of freedom, at least 2.
        t: observed t statistics.

    Returns:
        Noncentralities, in the broadcast shape.
    """
    p, df, t = np.broadcast_arrays(*(np.asarray(values, dtype=np.float64) for values in (p, df, t)))
    # T <= t at delta is -T >= -t at -delta, so only t >= 0 is needed.
    target = special.ndtri(np.where(t < 0, 1 - p, p)).ravel()
    size, df = np.abs(t).ravel(), df.ravel()
    sd = np.sqrt(1 + size**2 / (2 * df))
    wide = size > _WIDE * np.sqrt(2 * df)
    # Starts: Z - t s is nearly normal (Johnson and Welch 1940); for a large t the variation of s is all that matters.
    delta = np.where(
        wide,
        size * np.sqrt(special.chdtri(df, special.ndtr(target)) / df),
        size * (1 - 1 / (4 * df)) - target * sd,
    )
    for chosen, distribution in ((~wide, _over_denominator), (wide, _over_numerator)):
        if chosen.any():
            delta[chosen] = _newton(distribution(df[chosen]), target[chosen], size[chosen], delta[chosen], sd[chosen])
    return np.where(t < 0, -1.0, 1.0) * delta.reshape(t.shape)


def _newton(distribution: _Distribution, target: _Values, t: _Values, delta: _Values, sd: _Values) -> _Values:
    """Return delta with Phi^-1(P(T <= t)) = target, from a start; `distribution` gives P and -dP/d(delta)."""
    for _ in range(20):
        value, slope = distribution(delta, t)
        probit = special.ndtri(np.clip(value, 1e-300, 1 - 1e-16))
        change = (probit - target) * np.exp(-(probit**2) / 2) / np.sqrt(2 * np.pi) / np.maximum(slope, 1e-300)
        # Far out in a tail the slope is only rounding; a bounded step comes back from there.
        delta = delta + np.clip(change, -sd, sd)
        if np.all(np.abs(change) < 1e-9 * sd):
            break
    return delta


def _over_denominator(df: _Values) -> _Distribution:
    """Return P(T <= t) and -dP/d(delta) as integrals over s."""
    df = df[:, None]
    half = _REACH / np.sqrt(2 * df)
    low, high = np.maximum(1 - half, 1e-12), 1 + half
    s = (low + high + (high - low) * _NODES) / 2
    log_density = (df - 1) * np.log(s) - df * (s**2 - 1) / 2
    weights = _WEIGHTS * np.exp(log_density - log_density.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)

    def distribution(delta: _Values, t: _Values) -> tuple[_Values, _Values]:
        at = t[:, None] * s - delta[:, None]
        density = np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
        return (special.ndtr(at) * weights).sum(axis=1), (density * weights).sum(axis=1)

    return distribution


def _over_numerator(df: _Values) -> _Distribution:
    """Return P(T <= t) and -dP/d(delta) as integrals over Z."""
    df = df[:, None]
    z = _REACH * _NODES
    weights = _WEIGHTS * np.exp(-(z**2) / 2)
    weights /= weights.sum()
    log_constant = np.log(2) + df / 2 * np.log(df / 2) - special.gammaln(df / 2)

    def distribution(delta: _Values, t: _Values) -> tuple[_Values, _Values]:
        ratio = np.maximum((z + delta[:, None]) / t[:, None], 1e-12)
        density = np.exp(log_constant + (df - 1) * np.log(ratio) - df / 2 * ratio**2)
        return special.chdtrc(df, df * ratio**2) @ weights, density @ weights / t

    return distribution
