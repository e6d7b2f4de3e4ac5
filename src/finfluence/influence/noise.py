"""The noise σ² that the order of the data puts on a measurement, for each kind of sampler."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, bin_sums, compact, credibility, moderate, one_of, signals
from finfluence.influence.grid import Course, Grid, Panel, Positions, ShuffledEpochs, grid_weights
from finfluence.influence.totals import centred_signals


@dataclass(frozen=True)
class Noise:
    """Variance of the measurement over reruns of the sampler, and its parts.

    Attributes:
        variance: σ², squared units of the measurement.
        per_sample: (n,) v_i, each sample's share, Σ v_i = σ²; None where only the total is known (then v_i = σ²/n).
        method: which formula gave it.
        note: what a reader should know about it, one sentence.
        between: Σ over epochs of the variance between samples' mean signals. Centring on a batch of b samples adds
            between/b to the variance of a sample's centred total.
        drift: Σ over epochs of the variance over positions of the mean signal, which a sample's uncentred total has
            beyond v_i.
        relative_error: standard error of `variance` over `variance` itself, from the panel's finite number of samples.
        own_course: ω², the share of the variance that is left without the course that all samples have in common (see
            `Course`), which says nothing of how much another path would change. 1 where nothing tells.
        own_per_sample: (n,) the same of each sample's share, Σ = ω²σ²; None: ω²·v_i.
        credibility: k; a subset of s samples takes the mean of its own v_i with the weight s/(s + k) and the mean over
            all samples with the rest. 0 where v_i is exact, larger the fewer visits stand behind it.
    """

    variance: float
    per_sample: Floats | None
    method: str
    note: str
    between: float = 0.0
    drift: float = 0.0
    relative_error: float = 0.0
    own_course: float = 1.0
    own_per_sample: Floats | None = None
    credibility: float = 0.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.variance) or self.variance < 0:
            raise InputError(f"the noise variance is {self.variance}; it must be finite and not negative")

    @property
    def sigma(self) -> float:
        """σ, units of the measurement."""
        return float(np.sqrt(self.variance))

    def on_own_course(self) -> "Noise":
        """The part of the noise in which samples do not follow one course, see `own_course`."""
        own = self.own_per_sample
        if own is None and self.per_sample is not None:
            own = self.own_course * self.per_sample
        return replace(self, variance=self.own_course * self.variance, per_sample=own, between=0.0)


def spread(noise: Noise, like: Noise) -> Noise:
    """Return `noise` with its variance shared among the samples in the proportions of another estimate.

    The panel gives a good σ² but no v_i for samples outside it; successive differences give every sample's v_i but too
    large a sum.

    Raises:
        InputError: `like` has no per-sample variances.
    """
    if like.per_sample is None or not like.per_sample.sum() > 0:
        raise InputError(f"the {like.method} noise has no per-sample variances; give one that has")
    return replace(
        noise,
        per_sample=like.per_sample * (noise.variance / like.per_sample.sum()),
        credibility=like.credibility,
        note=f"{noise.note} Shared among samples by {like.method}.",
    )


def shuffled_noise(
    panel: Panel, sampler: ShuffledEpochs, *, epochs: int | None = None, positions: Positions = "random"
) -> Noise:
    """Noise of shuffling without replacement, from the panel, by the variance of a combinatorial sum.

    An epoch puts the n samples into n slots, c_p of them at position p, by a uniform permutation. Hoeffding (1951, Ann.
    Math. Statist. 22, 558): the sum of the matrix entries so picked has variance Σ_{i,p} c_p d²_{i,p}/(n − 1), d the
    matrix centred over samples and over slots. With r_{i,p} = x_{i,p} − mean_i this is Σ_i Q_i/(n − 1),

        Q_i = Σ_p c_p r²_{i,p} − (Σ_p c_p r_{i,p})²/n.

    Under drop_last the n − Σ c_p slots left over hold x = 0; they add nothing to either sum but count in the n, so the
    formula holds as it stands, and contains the variance from who is left out. Each Q_i is a quadratic form in centred
    rows, so (m − 1) in place of (n − 1) makes a panel of m random samples unbiased; `Grid` does the same for positions.
    Epochs are independent and add.

    Args:
        panel: m ≥ 2 random samples at G positions of every epoch.
        sampler: the sampler that ran.
        epochs: epochs of the run, if the panel has only some; the others are taken to be like these on average.
        positions: how the grid was chosen, see `grid_weights`.

    Returns:
        Noise; `per_sample` (n,) where the panel holds every sample, else None.

    Raises:
        InputError: a panel of one sample, or more epochs in the panel than in the run.
    """
    n = sampler.n_samples
    share = float(sampler.sizes().sum()) / n
    forms: list[Floats] = []
    own: list[Floats] = []
    spare = 0.0
    members: list[tuple[int, ...]] = []
    between = drift = 0.0
    for codes, places, matrix in panel.epochs(n):
        if len(codes) < 2:
            raise InputError("the noise panel has one sample; record two or more (50 to 100 is usual)")
        grid = grid_weights(places, sampler, positions=positions)
        column = matrix.mean(axis=0)
        form, row, wobble = quadratic_form(matrix - column, grid, n)
        course = Course.of(matrix - column)
        own.append(course.spared * quadratic_form(course.rest, grid, n)[0])
        spare += course.degrees
        # Means over slots that drop_last leaves empty are means over visits times the share of visits.
        between += max(float((row**2).sum() / (len(codes) - 1) - wobble.mean()), 0.0) / share
        mean_form = quadratic_form(column[None, :], grid, n)[0][0] / n
        drift += max(float(mean_form - form.mean() / n * (1 / len(codes) - 1 / n)), 0.0)
        forms.append(form)
        members.append(tuple(codes.tolist()))
    seen = len(forms)
    if epochs is not None and epochs < seen:
        raise InputError(f"the panel has {seen} epochs but the run {epochs}; pass the run's own number of epochs")
    scale = 1.0 if epochs is None else epochs / seen
    variance = scale * sum(float(form.sum()) / (len(form) - 1) for form in forms)
    m = len(members[0])
    same = all(other == members[0] for other in members)
    parts = [np.sum(forms, axis=0)] if same else forms
    error = sum(part.var(ddof=1) / len(part) * (1 - len(part) / n) for part in parts)
    apart = scale * sum(float(form.sum()) / (len(form) - 1) for form in own)
    per_sample = scale * parts[0] / (n - 1) if same and m == n else None
    missing = "" if scale == 1 else f" Scaled from {seen} to {epochs} epochs."
    return Noise(
        variance=max(variance, 0.0),
        per_sample=None if per_sample is None else np.maximum(per_sample, 0.0),
        method="shuffled",
        note=f"Combinatorial variance from a panel of {m} of {n} samples.{missing}",
        between=scale * between,
        drift=scale * drift,
        relative_error=scale * float(np.sqrt(error)) / variance if variance > 0 else 0.0,
        own_course=min(1.0, apart / variance) if variance > 0 else 1.0,
        own_per_sample=None if per_sample is None else moderate(scale * np.sum(own, axis=0) / (n - 1), spare),
    )


def quadratic_form(rows: Floats, grid: Grid, n: int) -> tuple[Floats, Floats, Floats]:
    """Return Q_i, the mean over slots and that mean's sampling variance, each (rows,), of signals (rows, G)."""
    scaled = rows * grid.sizes
    total = scaled @ grid.linear
    wobble = grid.correction * scaled.var(axis=1, ddof=1) if grid.correction else np.zeros(len(rows))
    return scaled**2 @ grid.square - (total**2 - wobble) / n, total / n, wobble / n**2


def with_replacement_noise(step: ArrayLike, code: ArrayLike, *, value: ArrayLike, n_samples: int) -> Noise:
    """Noise of drawing every batch independently with replacement, from the batch signals alone.

    A step is b independent uniform draws, so its sum has variance b·var_i(x_{·,t}) (population variance over the n
    samples), and the batch's own variance s_t² with b − 1 is unbiased for it: σ² = Σ_t b·s_t². A sample's share is v_i
    = Σ_{visits} (x − x̄_t)²·b/(b − 1).

    Args:
        step: (n_signals,) integers. A sample drawn twice in a step has two rows.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        n_samples: n.

    Raises:
        InputError: see `signals`; batches of one sample throughout.
    """
    steps, codes, values = signals(step, code, value, n_samples=n_samples)
    difference, size = centred_signals(steps, values)
    raw = bin_sums(codes, difference**2 * size / np.maximum(size - 1, 1), n_samples)
    mean = values - difference
    return Noise(
        variance=float(raw.sum()),
        per_sample=raw,
        credibility=credibility(raw, len(values) / n_samples),
        method="with-replacement",
        note="Independent draws with replacement, from the batch signals.",
        drift=float((mean**2).sum()) / n_samples,
    )


def poisson_noise(
    step: ArrayLike,
    code: ArrayLike,
    *,
    value: ArrayLike,
    n_samples: int,
    rate: float,
    weights: Literal["expected", "actual"] = "expected",
) -> Noise:
    """Noise of Poisson sampling (each sample in each batch independently with probability p), from the batch signals.

    With the fixed weight 1/b, b = p·n ("expected"), a step's sum has variance p(1 − p)·Σ_i x²_{i,t}, for which
    (1 − p)·Σ_{i ∈ batch} x² is unbiased (Horvitz and Thompson, 1952). With the weight 1/|B| of the batch that was drawn
    ("actual") the sum is a ratio; to first order in 1/b its variance is p(1 − p)·Σ_i (x − x̄)² at weight 1/b, estimated
    by (1 − p)·Σ_{i ∈ batch} (x − x̄_t)²·|B|/(|B| − 1) with the signals as recorded (an error of order 1/b).

    With fixed weights and a fixed rate nothing takes the place of a removed sample: use budget="epochs" for the shift.

    Args:
        step: (n_signals,) integers; steps whose batch was empty have no rows.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        n_samples: n.
        rate: p, between 0 and 1.
        weights: how the loss was averaged.

    Raises:
        InputError: a rate outside (0, 1]; see `signals`.
    """
    one_of(weights, ("expected", "actual"), "weights")
    if not 0 < rate <= 1:
        raise InputError(f"rate is {rate}; the probability that a sample is in a batch lies above 0 and at most 1")
    steps, codes, values = signals(step, code, value, n_samples=n_samples)
    if weights == "expected":
        squares = values**2
        drift = 0.0
    else:
        difference, size = centred_signals(steps, values)
        squares = difference**2 * size / np.maximum(size - 1, 1)
        drift = float(((values - difference) ** 2).sum()) * (1 - rate) / n_samples
    raw = (1 - rate) * bin_sums(codes, squares, n_samples)
    return Noise(
        variance=float(raw.sum()),
        per_sample=raw,
        credibility=credibility(raw, len(values) / n_samples),
        method="poisson",
        note=f"Poisson sampling at rate {rate:g}, loss averaged with the {weights} batch size.",
        drift=drift,
    )


def successive_noise(step: ArrayLike, code: ArrayLike, *, value: ArrayLike, n_samples: int) -> Noise:
    """Noise of shuffling where there is no panel: successive differences of each sample's own signals.

    Half the mean squared difference between a sample's centred signals in successive epochs estimates their variance
    over positions (von Neumann, 1941). The batch mean's own noise is taken out: with u the mean of these, W the mean
    variance within a batch (b − 1) and u = (1 − 1/b)(v + (W − v)/b), v = (u/(1 − 1/b) − W/b)/(1 − 1/b). Sensitivities
    that drift from one epoch to the next add to the differences, so σ² is bounded from above. With one epoch there are
    no differences, and the formula with replacement, larger still, takes its place.

    Args:
        step: (n_signals,) integers.
        code: (n_signals,) sample codes.
        value: (n_signals,) signals, units of the measurement.
        n_samples: n.

    Returns:
        Noise with `per_sample` (n,).
    """
    steps, codes, values = signals(step, code, value, n_samples=n_samples)
    difference, size = centred_signals(steps, values)
    own, pairs, visits = successive_variances(steps, codes, value=difference, n_samples=n_samples)
    if not pairs.any():
        bound = with_replacement_noise(steps, codes, value=values, n_samples=n_samples)
        note = "One epoch without a panel: the formula with replacement, an upper bound."
        return replace(bound, method="successive", note=note)
    inverse = float(np.mean(1 / size))
    within = float((difference**2).sum() / len(values)) / (1 - inverse)
    raised = float((own * visits).sum() / len(values)) / (1 - inverse)
    v = (raised - within * inverse) / (1 - inverse)
    if v <= 0:
        v = raised
    repeats = float(pairs[pairs > 0].mean())
    raw = own * visits
    variance = v * len(values)
    per_sample = raw * (variance / raw.sum()) if raw.sum() > 0 else np.full(n_samples, variance / n_samples)
    per_visit = len(values) / n_samples
    return Noise(
        variance=variance,
        per_sample=per_sample,
        method="successive",
        note="Successive differences over epochs, without a panel: an upper bound where sensitivities drift.",
        # Degrees of freedom of a von Neumann estimate from k differences: 2k²/(3k − 1).
        credibility=credibility(raw, 2 * repeats**2 / (3 * repeats - 1)),
        between=max(within - v, 0.0) * per_visit,
        drift=_mean_drift(steps, values - difference, noise=within * inverse, per_visit=per_visit),
    )


def successive_variances(
    step: ArrayLike, code: ArrayLike, *, value: ArrayLike, n_samples: int
) -> tuple[Floats, Floats, Floats]:
    """Half the mean squared difference of each sample's successive signals (von Neumann, 1941).

    Returns:
        (variance of one visit (n,), number of differences (n,), visits (n,)). A sample seen fewer than twice gets the
        mean variance.
    """
    steps, codes, values = signals(step, code, value, n_samples=n_samples)
    order = np.lexsort((steps, codes))
    codes, values = codes[order], values[order]
    same = codes[1:] == codes[:-1]
    squares = np.diff(values)[same] ** 2 / 2
    sums = bin_sums(codes[1:][same], squares, n_samples)
    pairs = np.bincount(codes[1:][same], minlength=n_samples).astype(np.float64)
    mean = float(sums.sum() / max(pairs.sum(), 1))
    own = np.where(pairs > 0, sums / np.maximum(pairs, 1), mean)
    return own, pairs, np.bincount(codes, minlength=n_samples).astype(np.float64)


def _mean_drift(step: np.ndarray, mean: Floats, *, noise: float, per_visit: float) -> float:
    """Σ over epochs of the variance of the batch means beyond `noise`, the sampling variance of one batch mean."""
    steps, n_steps = compact(step)
    means = np.zeros(n_steps)
    means[steps] = mean
    n_epochs = max(round(per_visit), 1)
    parts = np.array_split(means, n_epochs)
    return sum(max(float(part.var(ddof=1)) - noise, 0.0) for part in parts if len(part) > 1)
