"""Clopper-Pearson lower bounds on |mu| over thresholds (auditing; Nasr et al. 2023, arXiv 2302.07956)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from finfluence.tradeoff.laws import Alternative, tails

REPORTED_LEVEL = 0.95
_Counts = tuple[tuple[int, int, int, int], ...]  # false alarms, n_with, misses, n_without; one a threshold
_THRESHOLDS = 16
_SMALLEST_ERROR = 1e-300


@dataclass(frozen=True)
class ThresholdBounds:
    """Bounds on mu from the errors of threshold tests, with Bonferroni over thresholds.

    `lower` bounds mu from below, `upper` from above; each is valid alone at error (1 - level) / 2. They hold for any P
    and Q in this sense: some threshold test is at least as good as the bound says. Both ends bound the same mu only
    when T(P, Q) = G_mu. Where thresholds contradict each other (lower > upper, so T(P, Q) is not Gaussian), the
    interval keeps the end of larger magnitude and leaves the other open.

    Attributes:
        errors_up: (false alarms, n_with, misses, n_without) of "reject if above", one entry a threshold.
        errors_down: the same for "reject if below", which speaks for mu < 0.
        thresholds: number of bounds that Bonferroni shares the error over.
    """

    errors_up: _Counts
    errors_down: _Counts
    thresholds: int

    @classmethod
    def of(cls, losses_with: NDArray[np.float64], losses_without: NDArray[np.float64]) -> "ThresholdBounds":
        """Return the bounds of two samples (n_with,) and (n_without,)."""
        return cls(
            _error_counts(losses_with, losses_without),
            _error_counts(-losses_with, -losses_without),
            min(_THRESHOLDS, losses_with.size) + min(_THRESHOLDS, losses_without.size),
        )

    def interval(self, level: float) -> tuple[float, float]:
        """Return (lower, upper), each a one-sided bound at error (1 - level) / 2; either may be infinite."""
        low, high = self.lower((1 - level) / 2), self.upper((1 - level) / 2)
        if low <= high:
            return low, high
        return (low, np.inf) if abs(low) >= abs(high) else (-np.inf, high)

    def p(self, alternative: Alternative) -> float:
        """Return the smallest error at which a bound excludes 0 (Bonferroni-corrected, so conservative)."""
        return tails(_smallest_error(self.lower), _smallest_error(lambda error: -self.upper(error)), alternative)

    def bound(self, level: float) -> float:
        """Return the signed lower bound on |mu|: its sign says which way, 0 that the data do not exclude mu = 0."""
        error = (1 - level) / 2
        up, down = max(self.lower(error), 0.0), max(-self.upper(error), 0.0)
        return up if up >= down else -down

    def lower(self, error: float) -> float:
        """Return the one-sided lower bound on mu at this error probability."""
        return _lower_bound(self.errors_up, error / self.thresholds)

    def upper(self, error: float) -> float:
        """Return the one-sided upper bound on mu at this error probability."""
        return -_lower_bound(self.errors_down, error / self.thresholds)

    def se(self) -> float:
        """Return the delta-method standard error of mu_tau at the threshold that gives the stronger bound."""
        up, down = self.lower(0.025), -self.upper(0.025)
        counts = self.errors_up if up >= down else self.errors_down
        bounds = _bounds(counts, 0.025 / self.thresholds)
        a, n, b, m = counts[int(np.argmax(bounds))]
        return float(np.sqrt(_probit_variance(a, n) + _probit_variance(b, m)))


def _error_counts(losses_with: NDArray[np.float64], losses_without: NDArray[np.float64]) -> _Counts:
    """Return (false alarms, n_with, misses, n_without) of "reject if above", at thresholds on fixed ranks.

    A threshold chosen by looking at the pooled data would void Clopper-Pearson. At a fixed rank of its own sample it is
    exact, since F(x_(i)) is Beta(i, n - i + 1): every fixed rank of P (false alarms at x_(i)) is paired with the lowest
    fixed rank of Q at or above it (misses up to y_(j)), and both bounds hold for any threshold between the two.
    """
    p, q = np.sort(losses_with), np.sort(losses_without)
    ranks_p, ranks_q = _fixed_ranks(p.size), _fixed_ranks(q.size)
    counts = []
    for rank in ranks_p:
        at_or_above = ranks_q[q[ranks_q - 1] >= p[rank - 1]]
        if at_or_above.size:
            counts.append((int(p.size - rank), int(p.size), int(at_or_above[0] - 1), int(q.size)))
    return tuple(counts)


def _fixed_ranks(n: int) -> NDArray[np.int64]:
    """Return at most 16 ranks 1..n, spread evenly and holding both ends."""
    return np.unique(np.round(np.linspace(1, n, min(n, _THRESHOLDS))).astype(np.int64))


def _bounds(counts: _Counts, error: float) -> NDArray[np.float64]:
    """Return Phi^-1(1 - alpha_upper) - Phi^-1(beta_upper) for every threshold, `error` for each of the two bounds."""
    a, n, b, m = np.array(counts, dtype=np.float64).T
    # k of n: the upper bound is the (1 - error) quantile of Beta(k + 1, n - k), i.e. one minus a lower quantile.
    correct_p = special.betaincinv(n - a, a + 1, error)
    correct_q = special.betaincinv(m - b, b + 1, error)
    return special.ndtri(correct_p) + special.ndtri(correct_q)


def _lower_bound(counts: _Counts, error: float) -> float:
    return float(np.max(_bounds(counts, error))) if counts else -np.inf


def _smallest_error(bound: Callable[[float], float]) -> float:
    """Return the smallest error probability at which bound(error) >= 0, by bisection on its logarithm."""
    low, high = np.log(_SMALLEST_ERROR), 0.0
    if bound(1.0) < 0:
        return 1.0
    for _ in range(60):
        half = (low + high) / 2
        low, high = (low, half) if bound(np.exp(half)) >= 0 else (half, high)
    return float(np.exp(high))


def _probit_variance(k: int, n: int) -> float:
    """Return the delta-method variance of Phi^-1 of a binomial proportion, moved inside (0, 1) by half a count."""
    rate = (k + 0.5) / (n + 1)
    z = special.ndtri(rate)
    return float(rate * (1 - rate) / n * 2 * np.pi * np.exp(z**2))
