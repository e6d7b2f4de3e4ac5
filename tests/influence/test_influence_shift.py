"""μ and its standard error against repeated simulated runs.

Each simulation has a known matrix of signals, so that the shift of a removal is known exactly; seeds are fixed. Means
are compared within 5 standard errors, variances within 5 standard errors of a variance estimate plus the stated share
for what the formula leaves out.
"""

import numpy as np
import pytest
from influence_simulation import agrees, panel_arrays, shuffle_run, signal_matrix

from finfluence.errors import InputError
from finfluence.influence import (
    DerivativeError,
    Noise,
    Panel,
    Removal,
    SampleIndex,
    SampleTotals,
    ShuffledEpochs,
    sample_estimates,
    shuffled_noise,
    subset_estimates,
    successive_noise,
    with_replacement_noise,
)

N, BATCH, EPOCHS = 120, 8, 2
SUBSETS = [np.arange(1), np.arange(10), np.arange(5, 65), np.arange(110)]


def setting(seed, **kwargs):
    rng = np.random.default_rng(seed)
    matrix = signal_matrix(rng, N, EPOCHS * N // BATCH, **kwargs)
    epoch, position, code, value = panel_arrays(matrix, BATCH, EPOCHS, samples=np.arange(N), grid=np.arange(N // BATCH))
    panel = Panel.from_flat(epoch, position, code=code, value=value)
    return rng, matrix, panel, shuffled_noise(panel, ShuffledEpochs(N, BATCH))


def exact_shift(matrix, subset):
    """Expected change of the sum of signals when batches come from the other samples, at equal steps."""
    rest = np.setdiff1d(np.arange(len(matrix)), subset)
    return BATCH * (matrix[rest].mean(0) - matrix.mean(0)).sum()


def pooled_unit(sizes, *, n=N):
    """Pooled sd of training with and without s samples over that of training with them: batches shrink by (n − s)/n."""
    return np.sqrt((1 + n / (n - np.asarray(sizes))) / 2)


SIZES = [len(subset) for subset in SUBSETS]


@pytest.mark.parametrize("centre", ["batch", "others"])
def test_shift_and_error_over_shuffles(centre):
    rng, matrix, _, noise = setting(1)
    packed = SampleIndex(N).pack(SUBSETS)
    removal = Removal(replacement="exact")
    runs, sims = [], 4000
    for _ in range(sims):
        step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS)
        totals = SampleTotals.from_signals(step, code, value=value, n_samples=N, centre=centre)
        found = subset_estimates(totals, noise, packed=packed, removal=removal)
        runs.append(found.mu)
    spread = np.std(runs, axis=0)
    truth = np.array([exact_shift(matrix, subset) for subset in SUBSETS]) / (noise.sigma * pooled_unit(SIZES))
    bias = np.mean(runs, axis=0) - truth * (1 if centre == "others" else (1 - 1 / BATCH) * N / (N - 1))
    assert (np.abs(bias) < 5 * spread / sims**0.5).all()
    # 10 %: samples share batches, which correlates their errors in ways the formula leaves out.
    assert agrees(spread**2, found.se**2, sims, slack=0.1)


def test_uncentred_error_over_shuffles():
    rng, matrix, _, noise = setting(2)
    packed = SampleIndex(N).pack(SUBSETS)
    removal = Removal(budget="epochs")
    runs, sims = [], 4000
    for _ in range(sims):
        step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS)
        totals = SampleTotals.from_signals(step, code, value=value, n_samples=N)
        found = subset_estimates(totals, noise, packed=packed, removal=removal)
        runs.append(found.mu)
    per_epoch = N // BATCH
    means = matrix.reshape(N, EPOCHS, per_epoch).mean(2).sum(1)
    truth = np.array([-means[subset].sum() for subset in SUBSETS]) / noise.sigma
    assert (np.abs(np.mean(runs, axis=0) - truth) < 5 * np.std(runs, axis=0) / sims**0.5).all()
    assert agrees(np.var(runs, axis=0), found.se**2, sims, slack=0.1)


def test_error_with_replacement():
    rng, matrix, _, _ = setting(3)
    packed = SampleIndex(N).pack(SUBSETS)
    steps = matrix.shape[1]
    runs, stated, sims = [], [], 3000
    for _ in range(sims):
        code = rng.integers(0, N, (steps, BATCH)).ravel()
        step = np.repeat(np.arange(steps), BATCH)
        value = matrix[code, step]
        noise = with_replacement_noise(step, code, value=value, n_samples=N)
        totals = SampleTotals.from_signals(step, code, value=value, n_samples=N)
        found = subset_estimates(totals, noise, packed=packed, removal=Removal(replacement="exact"))
        runs.append(found.mu * noise.sigma)
        stated.append((found.se * noise.sigma) ** 2)
    truth = np.array([exact_shift(matrix, subset) for subset in SUBSETS])
    bias = np.mean(runs, axis=0) - truth * (1 - 1 / BATCH)
    assert (np.abs(bias) < 5 * np.std(runs, axis=0) / sims**0.5).all()
    # The first subset is one sample, whose variance is drawn towards the others': groups only.
    assert agrees(np.var(runs, axis=0)[1:], np.mean(stated, axis=0)[1:], sims, slack=0.1)


def test_single_sample_z_scores_are_standard_normal_without_influence():
    # All samples share one level, so no sample has any influence; 20 epochs, 30 runs of 120 samples.
    rng = np.random.default_rng(4)
    epochs = 20
    matrix = np.tile(signal_matrix(rng, N, N // BATCH, rows=0, wobble=0), (1, epochs))
    matrix = matrix - matrix[:, : N // BATCH].mean(1, keepdims=True)
    z = []
    for _ in range(30):
        step, code, value = shuffle_run(rng, matrix, BATCH, epochs)
        noise = successive_noise(step, code, value=value, n_samples=N)
        totals = SampleTotals.from_signals(step, code, value=value, n_samples=N)
        found = sample_estimates(totals, noise)
        z.append(found.mu / found.se)
    assert np.std(z) == pytest.approx(1, abs=0.06)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.05, abs=0.015)


def test_small_and_exact_replacement_differ_by_the_factor():
    rng, matrix, _, noise = setting(5)
    step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS)
    packed = SampleIndex(N).pack(SUBSETS)
    for centre, top in (("batch", N), ("others", N - 1)):
        totals = SampleTotals.from_signals(step, code, value=value, n_samples=N, centre=centre)
        small = subset_estimates(totals, noise, packed=packed)
        exact = subset_estimates(totals, noise, packed=packed, removal=Removal(replacement="exact"))
        factor = top / (N - packed.sizes) / pooled_unit(packed.sizes)
        np.testing.assert_allclose(exact.mu, factor * small.mu)
        np.testing.assert_allclose(exact.se, factor * small.se)


def test_small_subsets_have_the_square_root_error():
    _, _, _, noise = setting(6, rows=0)
    totals = SampleTotals(np.ones(N), np.zeros(N), np.zeros(N), batch=1e9)
    plain = Noise(noise.variance, None, "shuffled", "")
    found = subset_estimates(totals, plain, packed=SampleIndex(N).pack([[3], [1, 2]]))
    np.testing.assert_allclose(found.se, np.sqrt(np.array([1, 2]) / N), rtol=0.02)


def test_full_signals_have_the_grid_error_and_the_noise_its_own():
    _, matrix, panel, noise = setting(7)
    keep = panel.position % 3 == 1
    coarse = Panel(*(getattr(panel, name)[keep] for name in ("epoch", "position", "code", "value")))
    totals = SampleTotals.from_panel(coarse, ShuffledEpochs(N, BATCH))
    assert totals.centred_variance is not None
    packed = SampleIndex(N).pack(SUBSETS)
    found = subset_estimates(totals, noise, packed=packed)
    own = np.sqrt([totals.centred_variance[subset].sum() for subset in SUBSETS]) / noise.sigma
    assert 0 < totals.common_error < 0.2
    expected = np.hypot(own, totals.common_error * found.mu)
    np.testing.assert_allclose(found.se, expected)
    np.testing.assert_allclose(found.null, own)
    uncertain = Noise(noise.variance, noise.per_sample, "shuffled", "", relative_error=0.3)
    wide = subset_estimates(totals, uncertain, packed=packed)
    np.testing.assert_allclose(wide.se, np.hypot(expected, 0.15 * found.mu))
    exact = SampleTotals.from_panel(panel, ShuffledEpochs(N, BATCH))
    mu = subset_estimates(exact, noise, packed=packed, removal=Removal(replacement="exact")).mu
    expected = [exact_shift(matrix, subset) for subset in SUBSETS]
    np.testing.assert_allclose(mu * noise.sigma * pooled_unit(SIZES), expected)


def test_the_derivatives_error_is_its_formula():
    """Path noise where samples have no course in common, and errors relative to the samples' μ and to the subset's."""
    _, _, panel, noise = setting(9)
    totals = SampleTotals.from_panel(panel, ShuffledEpochs(N, BATCH))
    packed, error = SampleIndex(N).pack(SUBSETS), DerivativeError(path=1.5, each=0.3, joint=0.2)
    found = subset_estimates(totals, noise, packed=packed, error=error)
    assert noise.own_per_sample is not None
    each = -totals.centred / noise.sigma
    squares = noise.own_per_sample, each**2
    f = np.array(SIZES) / N
    own, relative = (
        np.array([(1 - f[k]) ** 2 * v[s].sum() + f[k] ** 2 * np.delete(v, s).sum() for k, s in enumerate(SUBSETS)])
        for v in squares
    )
    path = 1.5**2 * own / noise.variance * (1 - 1 / N)  # centred on the n samples of a position
    np.testing.assert_allclose(found.se**2, path + 0.09 * relative + 0.04 * found.mu**2, rtol=1e-9)
    np.testing.assert_allclose(found.shared**2, 0.09 * relative + 0.04 * found.mu**2)
    np.testing.assert_allclose(found.null**2, path + 0.09 * relative * (np.array(SIZES) > 1), rtol=1e-9)
    plain = subset_estimates(totals, noise, packed=packed)
    np.testing.assert_array_equal(plain.mu, found.mu)
    assert (plain.se < 1e-6).all()  # every sample at every position: nothing is left to chance
    twice = subset_estimates(totals, noise, packed=packed, error=error.times(2))
    np.testing.assert_allclose(twice.se, 2 * found.se)
    for wrong in ({"path": -1.0}, {"each": float("nan")}, {"joint": -0.1}):
        with pytest.raises(InputError, match="not a number from 0 on"):
            DerivativeError(**wrong)


def test_noise_of_training_without_a_subset_is_that_of_smaller_batches():
    # Means over batches, summed over an epoch: 400 samples in 20 batches of 20 against 200 of them in 20 batches of 10.
    # Variances over 4,000 shuffles, standard error of their ratio 3 %; the seed is fixed.
    rng = np.random.default_rng(8)
    samples, positions = 400, 20
    matrix = rng.normal(size=(samples, positions))

    def variance(members):
        places = np.arange(positions)[:, None]
        orders = (rng.permutation(members).reshape(positions, -1) for _ in range(4000))
        return np.var([matrix[order, places].mean(1).sum() for order in orders])

    kept = np.arange(samples // 2)
    ratio = variance(kept) / variance(np.arange(samples))
    totals = SampleTotals(np.ones(samples), np.zeros(samples), np.zeros(samples))
    removal = Removal(replacement="exact")
    unit = removal.noise_ratio(np.array([samples // 2]), totals, noise=Noise(1.0, None, "shuffled", ""))[0]
    assert ratio == pytest.approx(2, rel=0.12)
    assert unit == pytest.approx(((1 + ratio) / 2) ** 0.5, rel=0.05)
    drawn = removal.noise_ratio(np.array([samples // 2]), totals, noise=Noise(1.0, None, "with-replacement", ""))
    assert drawn[0] == 1


def test_unvisited_samples_are_nan():
    totals = SampleTotals.from_signals([0, 0, 1, 1], [0, 1, 1, 0], value=[1.0, 2.0, 3.0, 1.0], n_samples=3)
    found = sample_estimates(totals, Noise(1.0, None, "x", ""))
    assert np.isnan(found.mu).tolist() == np.isnan(found.se).tolist() == [False, False, True]


def test_bad_input():
    totals = SampleTotals(np.ones(4), np.ones(4), np.ones(4))
    with pytest.raises(InputError, match="noise is zero"):
        sample_estimates(totals, Noise(0.0, None, "x", ""))
    with pytest.raises(InputError, match="3 samples and the totals 4"):
        sample_estimates(totals, Noise(1.0, np.ones(3), "x", ""))
    with pytest.raises(InputError, match="budget is 'hours'"):
        Removal("hours")  # pyright: ignore
    with pytest.raises(InputError, match="replacement"):
        Removal(replacement="none")  # pyright: ignore
