"""Whether mu may summarise two samples: do they look normal, with one variance?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.tradeoff import _checks

_SHAPIRO_MAXIMUM = 5000


@dataclass(frozen=True)
class Gaussianity:
    """What speaks against T(P, Q) = G_mu in two samples of measurements.

    Attributes:
        normality_p: Shapiro-Wilk p-value of the pooled residuals, each sample centred and scaled by itself.
        variance_p: Brown-Forsythe p-value (Levene's test around medians) of equal variances.
        sd_ratio: sd of the sample without over sd of the sample with.
        skewness: of the pooled residuals, 0 if normal.
        excess_kurtosis: of the pooled residuals, 0 if normal.
        n_with: number of runs with.
        n_without: number of runs without.
    """

    normality_p: float
    variance_p: float
    sd_ratio: float
    skewness: float
    excess_kurtosis: float
    n_with: int
    n_without: int

    def plausible(self, level: float = 0.01) -> bool:
        """Return whether neither test rejects at `level`, shared between the two (Bonferroni)."""
        return min(self.normality_p, self.variance_p) >= _checks.probability("level", level) / 2

    def __str__(self) -> str:
        verdict = (
            "nothing speaks against a Gaussian trade-off"
            if self.plausible()
            else "mu is a rough summary here; look at the trade-off curve or use the rank estimator"
        )
        return (
            f"normality p = {self.normality_p:.2g}, equal variance p = {self.variance_p:.2g} "
            f"(sd ratio {self.sd_ratio:.2f}, {self.n_with} and {self.n_without} runs): {verdict}"
        )


def gaussianity(losses_with: ArrayLike, losses_without: ArrayLike) -> Gaussianity:
    """Return how Gaussian, and how equal in variance, two samples of measurements look.

    Args:
        losses_with: (n_with,) measurements of P.
        losses_without: (n_without,) measurements of Q.

    Returns:
        Test results; a small sample rejects little, so a large p-value is no proof.

    Raises:
        InputError: on fewer than three values a sample, values that are not finite, or a sample that does not vary.
    """
    from scipy import stats  # half a second to import, and only retrainings need it

    p, q = _checks.sample("losses_with", losses_with), _checks.sample("losses_without", losses_without)
    for name, values in (("losses_with", p), ("losses_without", q)):
        if values.std() <= 8 * np.finfo(np.float64).eps * np.abs(values).max():
            raise InputError(f"{name} does not vary between runs (standard deviation 0); give every run its own seed.")
    residuals = np.concatenate([(values - values.mean()) / values.std(ddof=1) for values in (p, q)])
    # Shapiro-Wilk's p-value is calibrated up to 5000 values; an even thinning keeps the shape of the sample.
    thinned = np.sort(residuals)[:: -(-residuals.size // _SHAPIRO_MAXIMUM)]
    return Gaussianity(
        normality_p=float(stats.shapiro(thinned).pvalue),
        variance_p=float(stats.levene(p, q, center="median").pvalue),
        sd_ratio=float(q.std(ddof=1) / p.std(ddof=1)),
        skewness=float(stats.skew(residuals)),
        excess_kurtosis=float(stats.kurtosis(residuals)),
        n_with=p.size,
        n_without=q.size,
    )
