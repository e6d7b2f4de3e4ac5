"""Gaussian influence: one signed number with its error, and what it means for retraining."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from finfluence.errors import InputError
from finfluence.tradeoff import _checks
from finfluence.tradeoff.curves import g_mu
from finfluence.tradeoff.laws import ALTERNATIVES, Alternative, NormalLaw, SamplingLaw

SIGN_CONVENTION = (
    "mu > 0: the samples support the measured behaviour (removing them raises the measured loss); "
    "mu < 0: they work against it (removing them lowers it)."
)


@dataclass(frozen=True)
class GaussianInfluence:
    """The signed Gaussian influence of a set of samples on a measurement (f-INE, arXiv 2510.10510, Def. 2.4 and 2.5).

    mu = (E_Q m - E_P m) / sd with P trained with the samples and Q without: mu > 0 means that they support the measured
    behaviour, mu < 0 that they work against it. Everything about *how well* with and without can be told apart
    (`tradeoff`, `power`, `retrainings`) depends on |mu| alone; `superiority` and the one-sided p-values use the sign.

    Attributes:
        mu: the estimate, in standard deviations of the measurement over retrainings.
        se: its standard error; 0 if mu is known exactly.
        law: what gives the interval and p-value; by default mu is taken as normal with standard error `se`.
    """

    mu: float
    se: float = 0.0
    law: SamplingLaw | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", _checks.finite("mu", self.mu))
        object.__setattr__(self, "se", _checks.finite("se", self.se))
        if self.se < 0:
            raise InputError(f"se is {self.se:g}; give a standard error that is zero or positive.")

    def tradeoff(self, alpha: ArrayLike) -> NDArray[np.float64]:
        """Return the smallest type-II error at type-I error `alpha` (any shape): G_mu of |mu|."""
        return g_mu(alpha, self.mu)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval of mu; its method is the estimator's, an end may be infinite.

        Args:
            level: confidence in (0, 1).

        Raises:
            InputError: if level lies outside (0, 1).
        """
        level = _checks.probability("level", level)
        low, high = self._law.interval(level)
        return float(low), float(high)

    def p(self, alternative: Alternative = "two-sided") -> float:
        """Return the p-value of H0: mu = 0.

        Args:
            alternative: "two-sided", or one-sided "supporting" (mu > 0) or "harmful" (mu < 0).

        Raises:
            InputError: for another alternative.
        """
        _checks.choice("alternative", alternative, ALTERNATIVES)
        return self._law.p(alternative)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of H0: mu = 0."""
        return self.p("two-sided")

    @property
    def p_supporting(self) -> float:
        """One-sided p-value against mu > 0."""
        return self.p("supporting")

    @property
    def p_harmful(self) -> float:
        """One-sided p-value against mu < 0."""
        return self.p("harmful")

    def power(self, alpha: float = 0.05) -> float:
        """Return the power of the best level-`alpha` test on one retraining, 1 - G_mu(alpha)."""
        alpha = _checks.probability("alpha", alpha)
        return float(special.ndtr(special.ndtri(alpha) + abs(self.mu)))

    @property
    def superiority(self) -> float:
        """Probability that one retraining without the samples measures higher than one with: Phi(mu / sqrt 2)."""
        return float(special.ndtr(self.mu / math.sqrt(2)))

    def retrainings(self, alpha: float = 0.05, power: float = 0.8) -> int | float:
        """Return how many retrainings an arm show the effect: ceil(2 ((z_{1-alpha/2} + z_power) / mu)^2).

        Args:
            alpha: two-sided level, in (0, 1).
            power: probability of seeing the effect, in (0, 1).

        Returns:
            Retrainings with the samples, and as many without; at least 1, infinite for mu = 0.

        Raises:
            InputError: if alpha or power lies outside (0, 1), or power does not exceed alpha / 2.
        """
        alpha, power = _checks.probability("alpha", alpha), _checks.probability("power", power)
        distance = float(special.ndtri(power) - special.ndtri(alpha / 2))
        if distance <= 0:
            raise InputError(f"power is {power:g} with alpha {alpha:g}; ask for a power above alpha / 2.")
        runs = 2 * (distance / self.mu) ** 2 if abs(self.mu) > 1e-150 else math.inf
        return max(1, math.ceil(runs)) if math.isfinite(runs) else math.inf

    def __str__(self) -> str:
        low, high = self.interval(0.95)
        if math.isfinite(low) and math.isfinite(high):
            span = f"95 % {low:+.2f} to {high:+.2f}"
        elif math.isfinite(low):
            span = f"95 % at least {low:+.2f}"
        elif math.isfinite(high):
            span = f"95 % at most {high:+.2f}"
        else:
            span = "95 % anything"
        if low > 0:
            meaning = "supports the measured behaviour (removing these samples raises the measured loss)"
        elif high < 0:
            meaning = "works against the measured behaviour (removing these samples lowers the measured loss)"
        else:
            meaning = "direction not certain (the interval contains 0)"
        return f"mu = {self.mu:+.2f} ± {self.se:.2f} ({span}): {meaning}"

    @property
    def _law(self) -> SamplingLaw:
        return NormalLaw(self.mu, self.se) if self.law is None else self.law
