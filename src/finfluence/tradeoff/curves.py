"""Trade-off functions: G_mu, curves of two samples, and the mu that two error budgets need.

T(P, Q)(alpha) is the smallest type-II error of any test of P against Q whose type-I error is at most alpha
(Dong, Roth, Su 2022, arXiv 1905.02383, Def. 2.1).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from finfluence.errors import InputError
from finfluence.tradeoff import _checks
from finfluence.tradeoff.ranks import superiority

Direction = Literal["auto", "above", "below"]
Hull = Literal["none", "convex"]
_SLACK = 1e-9


def g_mu(alpha: ArrayLike, mu: float) -> NDArray[np.float64]:
    """Return G_mu(alpha) = Phi(Phi^-1(1 - alpha) - |mu|), the trade-off function of N(0, 1) against N(mu, 1).

    How well two laws can be told apart does not depend on which is larger, so only |mu| enters: G_mu = G_-mu.

    Args:
        alpha: type-I errors in [0, 1], any shape.
        mu: Gaussian influence, any sign.

    Returns:
        Type-II errors, the shape of `alpha` (a 0-d array for a number).

    Raises:
        InputError: if an alpha lies outside [0, 1] or mu is not finite.
    """
    magnitude = abs(_checks.finite("mu", mu))
    alphas = np.asarray(alpha, dtype=np.float64)
    if not np.all((alphas >= 0) & (alphas <= 1)):
        raise InputError("alpha holds a value outside [0, 1] (or NaN); give type-I errors between 0 and 1.")
    # -Phi^-1(alpha) is Phi^-1(1 - alpha) without losing the digits of a small alpha.
    return np.asarray(special.ndtr(-special.ndtri(alphas) - magnitude))


def error_budget(alpha: float, beta: float) -> float:
    """Return the smallest |mu| that a test with these errors can detect: Phi^-1(1 - alpha) - Phi^-1(beta).

    Args:
        alpha: type-I error allowed, in (0, 1).
        beta: type-II error allowed, in (0, 1).

    Returns:
        The mu with G_mu(alpha) = beta; 0 if alpha + beta >= 1, which coin tossing achieves.

    Raises:
        InputError: if alpha or beta lies outside (0, 1).
    """
    alpha, beta = _checks.probability("alpha", alpha), _checks.probability("beta", beta)
    return max(0.0, float(-special.ndtri(alpha) - special.ndtri(beta)))


@dataclass(frozen=True, eq=False)
class TradeoffCurve:
    """A trade-off function as a polygon; unpacks into `alphas, betas`, and calling it interpolates.

    Attributes:
        alphas: (points,) type-I errors, rising from 0 to 1; a repeated value is a vertical step.
        betas: (points,) type-II errors in [0, 1], not rising.
    """

    alphas: NDArray[np.float64]
    betas: NDArray[np.float64]

    def __post_init__(self) -> None:
        alphas, betas = (np.asarray(a, dtype=np.float64) for a in (self.alphas, self.betas))
        if alphas.ndim != 1 or alphas.shape != betas.shape or alphas.size < 2:
            raise InputError(
                f"a trade-off curve has shapes {alphas.shape} and {betas.shape}; give two equally long vectors."
            )
        rising = np.all(np.diff(alphas) >= -_SLACK) and np.all(np.diff(betas) <= _SLACK)
        ends = abs(alphas[0]) <= _SLACK and abs(alphas[-1] - 1) <= _SLACK and abs(betas[-1]) <= _SLACK
        if not (rising and ends and np.all((betas >= -_SLACK) & (betas <= 1 + _SLACK))):
            raise InputError(
                "a trade-off curve must have alphas rising from 0 to 1 and betas falling to 0 within [0, 1]; "
                "sort the points by alpha and add (0, 1) and (1, 0)."
            )
        object.__setattr__(self, "alphas", np.clip(alphas, 0, 1))
        object.__setattr__(self, "betas", np.clip(betas, 0, 1))

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        return iter((self.alphas, self.betas))

    def __call__(self, alpha: ArrayLike) -> NDArray[np.float64]:
        """Return the type-II error at each alpha, at a vertical step its lower end."""
        at = np.asarray(alpha, dtype=np.float64)
        last = np.concatenate([np.diff(self.alphas) > 0, [True]])
        return np.interp(at, self.alphas[last], self.betas[last])

    def convex_hull(self) -> "TradeoffCurve":
        """Return the largest convex curve below this one: what tossing a coin between tests achieves."""
        hull: list[tuple[float, float]] = []
        for x, y in zip(self.alphas.tolist(), self.betas.tolist(), strict=True):
            # A corner that lies on or above the chord of its neighbours is not part of the lower hull.
            while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) <= 0:
                hull.pop()
            hull.append((x, y))
        alphas, betas = np.array(hull).T
        return TradeoffCurve(alphas, betas)

    @classmethod
    def gaussian(cls, mu: float, points: int = 1001) -> "TradeoffCurve":
        """Return G_mu as a polygon with corners at evenly spaced quantiles of the test statistic.

        Args:
            mu: Gaussian influence; only its magnitude matters.
            points: corners; the chords lie above G_mu by less than 2e-5 |mu| at 1001.
        """
        magnitude = abs(_checks.finite("mu", mu))
        statistic = np.linspace(9 + magnitude, -9, points)
        alphas, betas = special.ndtr(-statistic), special.ndtr(statistic - magnitude)
        return cls(np.concatenate([[0.0], alphas, [1.0]]), np.concatenate([[1.0], betas, [0.0]]))


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def tradeoff_curve(
    losses_with: ArrayLike, losses_without: ArrayLike, *, direction: Direction = "auto", hull: Hull = "none"
) -> TradeoffCurve:
    """Return the empirical trade-off curve of two samples of measurements, by threshold tests on the measurement.

    The test rejects "trained with S" when the measurement lies beyond a threshold; every observed value is a threshold.
    Where larger measurements speak ever more for Q this is T(P, Q) itself, in general it lies above it.

    Args:
        losses_with: (n_with,) measurements of models trained with S, the sample of P.
        losses_without: (n_without,) measurements of models trained without S, the sample of Q.
        direction: reject "above" or "below" the threshold; "auto" takes the side that Q lies on (area under ROC curve).
        hull: "convex" returns the lower convex hull (tests may toss a coin), "none" the curve of the plain tests.

    Returns:
        The curve; `alphas, betas = tradeoff_curve(...)` unpacks it.

    Raises:
        InputError: on fewer than three values a sample, values that are not finite, or an unknown choice.
    """
    p, q = _checks.sample("losses_with", losses_with), _checks.sample("losses_without", losses_without)
    _checks.choice("direction", direction, ("auto", "above", "below"))
    _checks.choice("hull", hull, ("none", "convex"))
    if direction == "below" or (direction == "auto" and superiority(p, q) < 0.5):
        p, q = -p, -q
    thresholds = np.concatenate([np.unique(np.concatenate([p, q]))[::-1], [-np.inf]])
    alphas = 1 - np.searchsorted(np.sort(p), thresholds, side="right") / p.size
    betas = np.searchsorted(np.sort(q), thresholds, side="right") / q.size
    curve = TradeoffCurve(alphas, betas)
    return curve.convex_hull() if hull == "convex" else curve
