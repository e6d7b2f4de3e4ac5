"""Kriged totals: what a sample's signals would have been where no batch held it, predicted from the noise panel.

A run sees a sample once an epoch, at one position. The plain sum of those signals errs by where they happened to fall.
The panel saw m random samples at many positions, hence how signals move over a run; the best linear prediction of a
sample's total from what was seen of it (simple kriging; for curves seen at a few random points each: Yao, Müller and
Wang 2005, JASA 100, 577, "principal analysis by conditional expectation") uses it, and costs no further gradient. It
also tells how large a sample's signals are and how they vary, so that the panel's noise σ² can be corrected for the
panel's luck in its samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from finfluence.influence._arrays import Floats, Ints, bin_sums, credibility, signals
from finfluence.influence.grid import Panel, Positions, ShuffledEpochs, grid_weights
from finfluence.influence.noise import Noise, quadratic_form
from finfluence.influence.totals import SampleTotals, centred_signals, grid_spread

# A covariance of curves from fewer is worse than none; the plain sum is kept.
LEAST_PANEL = 24
# Observation noise over signal variance that cross-validation chooses among: from interpolation alone to mostly noise.
_NUGGETS = (0.003, 0.01, 0.03, 0.06, 0.12, 0.3, 1.0, 3.0)
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Curves:
    """The panel's signals as curves over the whole run, in the scale y = c_p·x that does not depend on batch sizes.

    Attributes:
        codes: (m,) samples of the panel.
        values: (m, T) y at each of the run's T steps less the panel's mean, linear between grid positions.
        sums: (m,) mean of the curve over an epoch's n slots, summed over epochs: the total, by interpolation.
        inner: (m, m) the quadratic form of `shuffled_noise` as a product of curves: Q of Σ_j a_j·curve_j is aᵀ·inner·a.
        total: (m,) the total by the grid's own weights.
        total_variance: (m,) of `total`, from the choice of grid positions.
        form: (m,) Q of each panel sample by the grid's own weights.
    """

    codes: Ints
    values: Floats
    sums: Floats
    inner: Floats
    total: Floats
    total_variance: Floats
    form: Floats

    @classmethod
    def from_panel(
        cls, panel: Panel, sampler: ShuffledEpochs, *, epochs: int, positions: Positions = "random"
    ) -> "Curves | None":
        """Lay the panel's epochs one behind the other.

        Args:
            panel: the noise panel.
            sampler: of the run.
            epochs: of the run.
            positions: how the grid was chosen, see `grid_weights`.

        Returns:
            None where the panel is too small, holds every sample, changes its samples or lacks epochs: curves need the
            same samples throughout.
        """
        n, sizes = sampler.n_samples, sampler.sizes()
        steps: list[Ints] = []
        parts: list[Floats] = []
        totals: list[tuple[Floats, Floats, Floats]] = []
        first: Ints | None = None
        for codes, places, matrix in panel.epochs(n):
            first = codes if first is None else first
            if not LEAST_PANEL <= len(codes) < n or not np.array_equal(codes, first):
                return None
            grid = grid_weights(places, sampler, positions=positions)
            centred = matrix - matrix.mean(axis=0)
            scaled = centred * grid.sizes
            factor = (grid.n_positions / n) ** 2 * (1 / len(places) - 1 / grid.n_positions)
            form, mean, _ = quadratic_form(centred, grid, n)
            totals.append((mean, factor * grid_spread(scaled, positions), form))
            steps.append(places + len(parts) * len(sizes))
            parts.append(scaled)
        if first is None or len(parts) != epochs:
            return None
        every = np.arange(epochs * len(sizes))
        values = _interpolated(every, np.concatenate(steps), np.concatenate(parts, axis=1))
        by_epoch = values.reshape(len(first), epochs, len(sizes))
        means = by_epoch.sum(axis=2) / n
        inner = np.einsum("jep,kep,p->jk", by_epoch, by_epoch, 1 / sizes) - n * means @ means.T
        total, variance, form = (np.sum(part, axis=0) for part in zip(*totals, strict=True))
        return cls(first, values, means.sum(axis=1), inner, total, variance, form)


def kriged(
    step: ArrayLike,
    code: ArrayLike,
    *,
    value: ArrayLike,
    panel: Panel,
    sampler: ShuffledEpochs,
    noise: Noise,
    epochs: int,
    positions: Positions = "random",
) -> tuple[SampleTotals, Noise] | None:
    """Totals of batch signals, each sample's predicted from its own signals and the panel's covariance, and the noise.

    With o the sample's centred signals, C their covariance over the panel with the noise ν·diag C added, k the
    covariance of o with the total that is sought (the mean over positions, summed over epochs), the best linear
    prediction is p = kᵀC⁻¹o. A prediction of this kind is drawn towards the mean, which would make the sum over a group
    of alike samples too small, so it is divided by λ, the slope of p on the total over the panel: the total is then
    met on average over shuffles, as by the plain sum, with less variance. ν, λ and the error all come from the panel
    with each of its samples predicted without itself (leave-one-out), ν as the one that errs least. With T the variance
    of totals and λ_i the model's own slope at the places where sample i was seen, the squared error is

        e_i² ∝ T·(1 − 2λ_i/λ + λ_i/λ²),

    times the sample's own scale: signals of different samples have one shape but not one size, so oᵀC⁻¹o over its
    degrees of freedom, shrunk to its mean by `credibility`, multiplies it; and times the factor by which the
    leave-one-out errors exceed it.

    The noise is corrected as a ratio estimate (Cochran 1977, 6.2): E(Q_i | o), the form of `shuffled_noise` expected of
    the sample's whole curve, is known for every sample, so σ² is multiplied by its mean over all samples over its mean
    over the panel, and is shared among samples in its proportions. What error is left is that of Q_i − R·E(Q_i | o)
    over the panel, R the ratio of the two sums.

    Args:
        step: (n_signals,) integers, 0 to T − 1: epoch · P + position.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        panel: of the same run.
        sampler: of the run.
        noise: of `shuffled_noise` on this panel.
        epochs: of the run.
        positions: how the panel's grid was chosen, see `grid_weights`.

    Returns:
        Totals with `centred_variance` and `total_variance`, and the noise; None where the panel cannot tell (see
        `Curves.from_panel`) or where the plain sum predicts the panel's own samples better.

    Raises:
        InputError: see `signals`.
    """
    n = sampler.n_samples
    steps, codes, values = signals(step, code, value, n_samples=n)
    curves = Curves.from_panel(panel, sampler, epochs=epochs, positions=positions)
    if curves is None or steps.min() < 0 or steps.max() >= curves.values.shape[1]:
        return None
    difference, size = centred_signals(steps, values)
    others = difference * size / np.maximum(size - 1, 1)
    seen = _Seen.arrange(steps, codes, others * size, n)
    found = _Kriging(curves).fit(seen, bin_sums(codes, others, n))
    if found is None:
        return None
    # Every step's mean enters once a slot: the sum over the run of the mean signal over n slots.
    common = float((values - difference).sum()) / n
    totals = SampleTotals(
        visits=seen.count.astype(np.float64),
        total=found.total + common,
        centred=found.total,
        centre="others",
        batch=float(1 / np.mean(1 / size)),
        centred_variance=found.square_error,
        total_variance=found.square_error,
    )
    return totals, _corrected(noise, found.form, curves)


def _corrected(noise: Noise, form: Floats, curves: Curves) -> Noise:
    """The panel's noise as a ratio estimate, with E(Q_i | o), (n,), as what is known of every sample."""
    known, n = form[curves.codes], len(form)
    if not (known.mean() > 0 and curves.form.sum() > 0):
        return noise
    ratio = float(curves.form.sum() / known.sum())
    rest = (curves.form - ratio * known).var(ddof=1) / len(known) * (1 - len(known) / n)
    plain = curves.form.var(ddof=1) / len(known) * (1 - len(known) / n)
    if rest >= plain:
        return noise
    variance = noise.variance * float(form.mean() / known.mean())
    return replace(
        noise,
        variance=variance,
        per_sample=variance * form / form.sum(),
        credibility=0.0,
        relative_error=float(np.sqrt(rest)) / float(curves.form.mean()),
        note=f"{noise.note} Corrected by a ratio estimate over all samples, and shared among them, from their signals.",
    )


@dataclass(frozen=True)
class _Seen:
    """Where each sample was seen and with what: (n, E) steps and centred signals, count[i] of them in a row."""

    steps: Ints
    values: Floats
    count: Ints

    @classmethod
    def arrange(cls, steps: Ints, codes: Ints, values: Floats, n: int) -> "_Seen":
        order = np.lexsort((steps, codes))
        count = np.bincount(codes, minlength=n)
        place = np.arange(len(codes)) - np.repeat(np.r_[0, np.cumsum(count)[:-1]], count)
        rows = np.zeros((2, n, int(count.max())))
        rows[0, codes[order], place], rows[1, codes[order], place] = steps[order], values[order]
        return cls(rows[0].astype(np.int64), rows[1], count)

    def rows(self, which: Ints | slice) -> "_Seen":
        return _Seen(self.steps[which], self.values[which], self.count[which])


@dataclass(frozen=True)
class _Predicted:
    """What was predicted of samples, all (k,).

    Attributes:
        total: best linear prediction of the total.
        slope: λ_i, the model's slope of the prediction on the truth.
        square: oᵀC⁻¹o.
        seen_form: Q of the predicted curve.
        unseen_form: expected Q of what the prediction leaves out, for a sample of mean size.
    """

    total: Floats
    slope: Floats
    square: Floats
    seen_form: Floats
    unseen_form: Floats

    @classmethod
    def solve(
        cls, seen: _Seen, around: Floats, *, sums: Floats, inner: Floats | None, dof: int, nugget: float
    ) -> "_Predicted":
        """Predict k samples from r centred curves, which may be others for each of them.

        Args:
            seen: of the k samples.
            around: (k, r, E) the curves where each sample was seen.
            sums: (k, r) or (1, r) their totals.
            inner: (k, r, r) or (1, r, r) the product of curves that gives Q; None leaves the forms zero, which takes
                half the time.
            dof: degrees of freedom of the curves.
            nugget: ν.
        """
        width = seen.steps.shape[1]
        used = np.arange(width) < seen.count[:, None]
        around = np.where(used[:, None, :], around, 0.0)
        covariance = around.swapaxes(1, 2) @ around / dof
        diagonal = np.diagonal(covariance, axis1=1, axis2=2)
        # the floor keeps a step at which no signal differs from making the system singular
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        covariance[:, np.arange(width), np.arange(width)] += np.where(used, nugget * diagonal + floor, 1.0)
        along = (around.swapaxes(1, 2) @ sums[:, :, None])[:, :, 0] / dof
        weights, gain = np.moveaxis(np.linalg.solve(covariance, np.stack([seen.values, along], axis=2)), 2, 0)
        seen_form, unseen_form = np.zeros((2, len(weights)))
        if inner is not None:
            shares = around @ weights[:, :, None] / dof
            seen_form = (inner @ shares * shares).sum(axis=(1, 2))
            explained = (np.linalg.solve(covariance, around.swapaxes(1, 2) @ inner) * around.swapaxes(1, 2)).sum((1, 2))
            unseen_form = np.maximum(np.trace(inner, axis1=1, axis2=2) / dof - explained / dof**2, 0.0)
        return cls(
            total=(weights * along).sum(axis=1),
            slope=(gain * along).sum(axis=1) / ((sums**2).sum(axis=1) / dof),
            square=(weights * seen.values).sum(axis=1),
            seen_form=seen_form,
            unseen_form=unseen_form,
        )


@dataclass(frozen=True)
class _Fit:
    """Totals, their squared errors and expected forms of all samples, all (n,)."""

    total: Floats
    square_error: Floats
    form: Floats


class _Kriging:
    """Prediction of totals from a few places of a curve.

    Args:
        curves: of the panel.
    """

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self.spread = float(curves.sums @ curves.sums) / (len(curves.sums) - 1)

    def fit(self, seen: _Seen, plain: Floats) -> _Fit | None:
        """Predict every sample; None where the plain sums, (n,), do better on the panel."""
        curves = self.curves
        if not self.spread > 0:
            return None
        mine = seen.rows(curves.codes)
        deviation = curves.total - curves.total.mean()

        def off(totals: Floats) -> float:
            # The panel's own mean is off by a common amount, which the variance does not count.
            return float((totals - curves.total).var(ddof=1))

        best: tuple[float, float, float, _Predicted] | None = None
        for nugget in _NUGGETS:
            left_out = self._left_out(mine, nugget, forms=False)
            shrinkage = float(left_out.total @ deviation / (deviation @ deviation))
            if shrinkage > 0 and (best is None or off(left_out.total / shrinkage) < best[0]):
                best = off(left_out.total / shrinkage), nugget, shrinkage, left_out
        if best is None or best[0] >= off(plain[curves.codes]):
            return None
        error, nugget, shrinkage, left_out = best
        left_out = self._left_out(mine, nugget, forms=True)
        found = self._predict(seen, nugget)
        for name in ("square", "seen_form", "unseen_form"):
            getattr(found, name)[curves.codes] = getattr(left_out, name)
        scale = _scales(found.square, seen.count)
        expected = float(_error(left_out.slope, shrinkage).mean()) * self.spread
        excess = max(error - float(curves.total_variance.mean()), error / 10) / expected
        total = np.where(seen.count > 0, found.total / shrinkage, 0.0)
        return _Fit(
            total - total.mean(),
            excess * self.spread * _error(found.slope, shrinkage) * scale,
            found.seen_form + scale * found.unseen_form,
        )

    def _left_out(self, mine: _Seen, nugget: float, *, forms: bool) -> _Predicted:
        """Predict the panel's own samples, every one from the others."""
        curves, m = self.curves, len(self.curves.sums)

        def others(own: Ints) -> tuple[Floats, Floats, Floats | None]:
            # The others' mean is the centre, and all m sum to zero: curve_i + curve_j/(m − 1). The own curve is zero.
            share = (np.arange(m) != own[:, None]) / (m - 1)
            around = curves.values[:, mine.steps[own]].swapaxes(0, 1)
            around[np.arange(len(own)), own] = 0.0
            around += share[:, :, None] * curves.values[own[:, None], mine.steps[own]][:, None, :]
            sums = np.where(share > 0, curves.sums, 0.0) + share * curves.sums[own, None]
            if not forms:
                return around, sums, None
            cross, square = curves.inner[own], np.diagonal(curves.inner)[own]
            pairs = (share > 0)[:, :, None] & (share > 0)[:, None, :]
            inner = curves.inner + (cross[:, :, None] + cross[:, None, :]) / (m - 1)
            return around, sums, np.where(pairs, inner + square[:, None, None] / (m - 1) ** 2, 0.0)

        return self._in_chunks(mine, others, dof=m - 2, nugget=nugget)

    def _predict(self, seen: _Seen, nugget: float) -> _Predicted:
        curves = self.curves

        def everyone(own: Ints) -> tuple[Floats, Floats, Floats | None]:
            return curves.values[:, seen.steps[own]].swapaxes(0, 1), curves.sums[None], curves.inner[None]

        return self._in_chunks(seen, everyone, dof=len(curves.sums) - 1, nugget=nugget)

    def _in_chunks(
        self, seen: _Seen, known: Callable[[Ints], tuple[Floats, Floats, Floats | None]], *, dof: int, nugget: float
    ) -> _Predicted:
        """Predict samples, as many at a time as the memory is for, from what is known for their positions in `seen`."""
        n, width = seen.steps.shape
        m = len(self.curves.sums)
        chunk = max(1, _CHUNK_BYTES // (8 * max(m, width) ** 2))
        parts = []
        for start in range(0, n, chunk):
            around, sums, inner = known(np.arange(start, min(start + chunk, n)))
            rows = seen.rows(slice(start, start + chunk))
            parts.append(_Predicted.solve(rows, around, sums=sums, inner=inner, dof=dof, nugget=nugget))
        return _joined(parts)


def _joined(parts: list[_Predicted]) -> _Predicted:
    return _Predicted(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _Predicted.__dataclass_fields__)
    )


def _scales(square: Floats, count: Ints) -> Floats:
    """Sizes of the samples' curves, mean 1, (n,), from oᵀC⁻¹o, each shrunk by what its number of signals is worth."""
    known = count > 0
    own, scale = square[known] / count[known], np.ones(len(square))
    if own.sum() > 0:
        own = own / own.mean()
        scale[known] = 1 + (own - 1) / (1 + credibility(own, float(count[known].mean())))
    return scale


def _error(slope: Floats, shrinkage: float) -> Floats:
    """E(p/λ − total)² over the variance of totals, for model slopes λ_i, see `kriged`."""
    return np.maximum(1 - 2 * slope / shrinkage + slope / shrinkage**2, 0.0)


def _interpolated(at: Ints, known: Ints, values: Floats) -> Floats:
    """Rows of values, (m, G) at the ascending places known, linear in between and constant beyond: (m, T)."""
    right = np.clip(np.searchsorted(known, at), 1, len(known) - 1)
    left = right - 1
    share = np.clip((at - known[left]) / (known[right] - known[left]), 0.0, 1.0)
    return values[:, left] * (1 - share) + values[:, right] * share
