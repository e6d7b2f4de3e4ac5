"""Composition: what several influences amount to together.

For Gaussians |mu| <= sqrt(sum mu_t^2) (f-INE Cor. 2.7; Dong, Roth, Su 2022, Cor. 3.3). Any trade-off functions compose
by the tensor product f (x) g = T(P x P', Q x Q') (Def. 3.1 there), computed from the law of the log-likelihood ratio;
many small ones tend to a Gaussian (Thm 3.5 there; f-INE Thm 2.8).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finfluence.errors import InputError
from finfluence.tradeoff import _checks
from finfluence.tradeoff.curves import TradeoffCurve
from finfluence.tradeoff.gaussian import GaussianInfluence

_TRIMMED = 1e-13  # mass at each end that is handed to "told apart for certain", per product
_ASYMMETRY = 1e-2
_WIDEST = 200_000


def compose(influences: Sequence[GaussianInfluence]) -> GaussianInfluence:
    """Return the most that several Gaussian influences can amount to: magnitude sqrt(sum mu_t^2).

    The magnitude is an upper bound, reached when the steps' randomness is independent. The sign is that of the parts if
    they agree, and else that of the sum of mu_t |mu_t|: the side that contributes more to the magnitude.

    Args:
        influences: independent estimates; at least one.

    Returns:
        The composed influence with a normal law; se by the delta method, sqrt(sum mu_t^2 se_t^2) / |mu|
        (and sqrt(mean se_t^2) where every mu_t is 0, where the delta method has no derivative).

    Raises:
        InputError: if the list is empty.
    """
    if not influences:
        raise InputError("compose got an empty list; give at least one GaussianInfluence.")
    mus = np.array([g.mu for g in influences])
    ses = np.array([g.se for g in influences])
    magnitude = math.hypot(*mus)
    if magnitude == 0:
        return GaussianInfluence(0.0, math.hypot(*ses) / math.sqrt(ses.size))
    # Divided first: mu_t near the smallest floats would otherwise vanish when squared.
    shares = mus / magnitude
    sign = -1.0 if float(np.sum(shares * np.abs(shares))) < 0 else 1.0
    return GaussianInfluence(sign * magnitude, math.hypot(*(shares * ses)))


def tensor_product(curves: Sequence[TradeoffCurve], *, step: float | None = None) -> TradeoffCurve:
    """Return f_1 (x) f_2 (x) ... as a polygon that never lies above the product of the polygons given.

    A convex polygon f is a pair of discrete laws: a segment of width w and slope -s has probability w under P and w s
    under Q, log-likelihood ratio log s. Ratios are put on a grid so that both probabilities are kept (each segment is
    split between its two neighbours: a spread, so the pair only becomes easier to tell apart, by O(step^2)), and the
    product is their convolution. (The grid that keeps both masses: Doroshenko et al. 2022, arXiv 2207.04380.)

    Args:
        curves: trade-off functions; each is replaced by its convex hull.
        step: grid of the log-likelihood ratio; by default 0.005, or finer where a curve's ratio varies little.

    Returns:
        The product's trade-off function.

    Raises:
        InputError: if the list is empty, or step is not positive or too fine for the curves.
    """
    if not curves:
        raise InputError("tensor_product got an empty list; give at least one trade-off curve.")
    if step is None:
        step = _default_step(curves)
    elif _checks.finite("step", step) <= 0:
        raise InputError(f"step is {step:g}; give a positive grid width of the log-likelihood ratio, e.g. 0.005.")
    total = _Pair.of(curves[0], step)
    for curve in curves[1:]:
        total = total.product(_Pair.of(curve, step))
    return total.curve()


def _default_step(curves: Sequence[TradeoffCurve]) -> float:
    """Return a twentieth of the smallest spread of a ratio, within 1e-4 to 0.005 and a quarter of the widest grid."""
    spreads, widest = [], 0.0
    for curve in curves:
        widths, ratios = _segments(curve.convex_hull())
        if ratios.size > 1:
            mean = np.average(ratios, weights=widths)
            spreads.append(float(np.sqrt(np.average((ratios - mean) ** 2, weights=widths))))
            widest = max(widest, float(np.ptp(ratios)))
    fine = min(0.005, max(0.05 * min(spreads, default=1.0), 1e-4))
    return max(fine, 4 * widest / _WIDEST)


def _segments(curve: TradeoffCurve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return width and log-likelihood ratio of a convex polygon's segments that both laws take, each (segments,)."""
    widths, drops = np.diff(curve.alphas), -np.diff(curve.betas)
    inside = (widths > 0) & (drops > 0)
    return widths[inside], np.log(drops[inside]) - np.log(widths[inside])


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two discrete laws on a grid of log-likelihood ratios l = (first + k) * step, and what lies at +-infinity.

    `affinity` is sqrt(p q), (cells,): p = affinity e^(-l/2), q = affinity e^(l/2). It keeps full relative precision
    where p or q alone would underflow in a convolution.
    """

    affinity: NDArray[np.float64]
    first: int
    step: float
    p_certain: float  # probability under P of values that Q never takes
    q_certain: float

    @classmethod
    def of(cls, curve: TradeoffCurve, step: float) -> "_Pair":
        p, ratios = _segments(curve.convex_hull())
        q = p * np.exp(ratios)
        p_certain, q_certain = 1 - float(p.sum()), 1 - float(q.sum())
        if not p.size:
            return cls(np.zeros(1), 0, step, 1.0, 1.0)
        position = ratios / step
        below = np.floor(position)
        cells = int(below.max() - below.min()) + 2
        if cells > _WIDEST:
            raise InputError(
                f"step is {step:g}, which needs {cells} cells; give a step of at least {step * cells / _WIDEST:.2g}."
            )
        first = int(below.min())
        # p = u + v and q = (u + v e^step) e^below: solved for v, the share of the upper neighbour.
        excess = (position - below) * step
        upper = p * np.expm1(excess) / np.expm1(step)
        index = (below - first).astype(np.int64)
        affinity = np.zeros(cells)
        np.add.at(affinity, index, (p - upper) * np.exp(below * step / 2))
        np.add.at(affinity, index + 1, upper * np.exp((below + 1) * step / 2))
        return cls(affinity, first, step, max(p_certain, 0.0), max(q_certain, 0.0)).trimmed()

    @property
    def _ratios(self) -> NDArray[np.float64]:
        return self.step * np.arange(self.first, self.first + self.affinity.size, dtype=np.float64)

    @property
    def p(self) -> NDArray[np.float64]:
        return self.affinity * np.exp(-self._ratios / 2)

    @property
    def q(self) -> NDArray[np.float64]:
        return self.affinity * np.exp(self._ratios / 2)

    def product(self, other: "_Pair") -> "_Pair":
        from scipy.signal import fftconvolve  # slow to import, and only this function needs it

        short = min(self.affinity.size, other.affinity.size) <= 64
        product = np.convolve(self.affinity, other.affinity) if short else fftconvolve(self.affinity, other.affinity)
        return _Pair(
            np.maximum(product, 0.0),
            self.first + other.first,
            self.step,
            1 - (1 - self.p_certain) * (1 - other.p_certain),
            1 - (1 - self.q_certain) * (1 - other.q_certain),
        ).trimmed()

    def trimmed(self) -> "_Pair":
        """Move negligible ends of the grid to certainty, which can only lower the trade-off function."""
        p, q = self.p, self.q
        # Where the ratio is large, Q's mass is the larger one, and at the other end P's.
        low = int(np.searchsorted(np.cumsum(p), _TRIMMED, side="right"))
        high = self.affinity.size - int(np.searchsorted(np.cumsum(q[::-1]), _TRIMMED, side="right"))
        if low >= high:
            return self
        return _Pair(
            self.affinity[low:high],
            self.first + low,
            self.step,
            self.p_certain + float(p[:low].sum() + p[high:].sum()),
            self.q_certain + float(q[:low].sum() + q[high:].sum()),
        )

    def curve(self) -> TradeoffCurve:
        p, q = self.p[::-1], self.q[::-1]  # the best test rejects the largest ratios first
        alphas = np.concatenate([[0.0, 0.0], np.cumsum(p), [1.0]])
        betas = np.concatenate([[1.0, 1 - self.q_certain], 1 - self.q_certain - np.cumsum(q), [0.0]])
        return TradeoffCurve(np.clip(alphas, 0, 1), np.clip(betas, 0, 1))


@dataclass(frozen=True)
class GaussianLimit:
    """The Gaussian that a composition of many small steps approaches, and how far off it may be.

    G_mu(alpha + error) - error <= f_1 (x) ... (x) f_k (alpha) <= G_mu(alpha - error) + error, for alpha in
    [error, 1 - error]; an error of one half or more says nothing.
    """

    mu: float
    error: float


def gaussian_limit(curves: Sequence[TradeoffCurve]) -> GaussianLimit:
    """Return the central limit of the composition of symmetric trade-off functions, with its Berry-Esseen error.

    With kl = -int log|f'|, kappa2 = int log^2|f'| and kappa3 = int |log|f'| + kl|^3 per step (Dong, Roth, Su 2022,
    Thm 3.5): mu = 2 sum kl / sqrt(sum kappa2 - sum kl^2), error = 0.56 sum kappa3 / (sum kappa2 - sum kl^2)^(3/2).

    Args:
        curves: symmetric trade-off functions (f equal to its own inverse), with f(0) = 1; each one's convex hull is
            used.

    Returns:
        Magnitude of the limiting mu, and the error in both alpha and beta.

    Raises:
        InputError: if the list is empty, a curve is asymmetric by more than 0.01, or has outcomes that only one
            law takes.
    """
    if not curves:
        raise InputError("gaussian_limit got an empty list; give at least one trade-off curve.")
    moments = np.sum([_moments(curve.convex_hull(), number) for number, curve in enumerate(curves)], axis=0)
    kl, variance, third = (float(value) for value in moments)
    if variance <= 0:
        return GaussianLimit(0.0, 0.0)
    return GaussianLimit(2 * kl / math.sqrt(variance), 0.56 * third / variance**1.5)


def _moments(curve: TradeoffCurve, number: int) -> tuple[float, float, float]:
    """Return kl, kappa2 - kl^2 and kappa3 of one convex curve."""
    widths, drops = np.diff(curve.alphas), -np.diff(curve.betas)
    if np.any((widths > 0) & (drops == 0)) or np.any((widths == 0) & (drops > 0)):
        raise InputError(f"curve {number} has outcomes that only one of its laws takes; use tensor_product for it.")
    mirrored = np.interp(curve.alphas, curve.betas[::-1], curve.alphas[::-1])
    asymmetry = float(np.max(np.abs(mirrored - curve.betas)))
    if asymmetry > _ASYMMETRY:
        raise InputError(
            f"curve {number} differs from its inverse by {asymmetry:.2g}; the limit holds for symmetric curves, "
            "use tensor_product for this one."
        )
    widths, ratios = _segments(curve)
    kl = -float(np.sum(widths * ratios))
    return kl, float(np.sum(widths * (ratios + kl) ** 2)), float(np.sum(widths * np.abs(ratios + kl) ** 3))
