"""Every noise formula against direct simulation of its sampler, and against naive loops.

Simulated variances are compared within 5 standard errors of a variance estimate, sqrt(2/simulations) relative: seeds
are fixed, and a fresh seed would fail with probability below 1e-5 a comparison.
"""

import numpy as np
import pytest
from influence_simulation import agrees, panel_arrays, positions, shuffle_run, signal_matrix

from finfluence.errors import InputError
from finfluence.influence import (
    Noise,
    Panel,
    ShuffledEpochs,
    poisson_noise,
    shuffled_noise,
    spread,
    successive_noise,
    with_replacement_noise,
)
from finfluence.influence._arrays import moderate
from finfluence.influence.noise import successive_variances


def panel_of(matrix, batch, epochs, **kwargs):
    epoch, position, code, value = panel_arrays(matrix, batch, epochs, **kwargs)
    return Panel.from_flat(epoch, position, code=code, value=value)


def naive_shuffled(matrix, batch, epochs, drop_last):
    """Hoeffding's sum over the n × n matrix of samples and slots, entry by entry."""
    n = len(matrix)
    per_epoch = positions(n, batch, drop_last=drop_last)
    total = 0.0
    for epoch in range(epochs):
        slots = np.zeros((n, n))
        for slot in range(n):
            place = slot // batch
            if place >= per_epoch:
                continue
            size = min(batch, n - place * batch)
            slots[:, slot] = matrix[:, epoch * per_epoch + place] * batch / size
        d = slots - slots.mean(0) - slots.mean(1, keepdims=True) + slots.mean()
        for i in range(n):
            for j in range(n):
                total += d[i, j] ** 2 / (n - 1)
    return total


@pytest.mark.parametrize("course", [[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 0.5, 0.1]], ids=["constant", "falling"])
@pytest.mark.parametrize("samples", [300, 60])
def test_the_own_course_is_what_a_common_one_leaves(course, samples):
    """Signals a_i·c_p alone have none; noise on top is found again, whether the course falls or stays; seed 3."""
    rng = np.random.default_rng(3)
    n, grid = 300, np.array([2, 8, 14, 20, 26])
    sizes, epochs = rng.normal(size=(n, 1)), 8
    smooth = np.tile(np.interp(np.arange(30), grid, course), epochs)[None, :] * sizes
    rough = 0.2 * rng.normal(size=(n, 30 * epochs))
    chosen = {"samples": np.arange(samples), "grid": grid}

    def noise_of(matrix):
        return shuffled_noise(panel_of(matrix / n, 10, epochs, **chosen), ShuffledEpochs(n, 10), positions="regular")

    alone = noise_of(smooth)
    assert alone.own_course < 1e-9 or alone.variance < 1e-20
    both, noise = noise_of(smooth + rough), noise_of(rough)
    assert both.own_course * both.variance == pytest.approx(noise.variance, rel=0.12)
    assert noise.own_course == pytest.approx(1.0, abs=0.25)
    if samples == n:
        assert both.own_per_sample is not None
        assert both.own_per_sample.sum() == pytest.approx(both.own_course * both.variance, rel=0.02)
        assert both.on_own_course().variance == pytest.approx(both.own_per_sample.sum(), rel=0.02)
    else:
        assert both.own_per_sample is None


def test_two_positions_show_no_course():
    matrix = np.outer(np.arange(40.0), np.linspace(1, 2, 10)) / 40
    panel = panel_of(matrix, 4, 1, samples=np.arange(40), grid=np.array([2, 7]))
    noise = shuffled_noise(panel, ShuffledEpochs(40, 4), positions="regular")
    assert noise.variance > 0
    assert noise.own_course == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "batch", "drop_last"), [(40, 8, False), (43, 8, False), (43, 8, True)])
@pytest.mark.parametrize("grid", ["random", "regular"])
def test_full_panel_equals_hoeffding_and_the_simulated_shuffles(n, batch, drop_last, grid):
    rng = np.random.default_rng(1)
    epochs, sims = 2, 4000
    per_epoch = positions(n, batch, drop_last=drop_last)
    matrix = signal_matrix(rng, n, epochs * per_epoch)
    panel = panel_of(matrix, batch, epochs, samples=np.arange(n), grid=np.arange(per_epoch), drop_last=drop_last)
    noise = shuffled_noise(panel, ShuffledEpochs(n, batch, drop_last), positions=grid)
    assert noise.variance == pytest.approx(naive_shuffled(matrix, batch, epochs, drop_last), rel=1e-9)
    assert noise.per_sample is not None
    assert noise.per_sample.sum() == pytest.approx(noise.variance)
    assert noise.relative_error == pytest.approx(0, abs=1e-12)
    ends = [shuffle_run(rng, matrix, batch, epochs, drop_last=drop_last)[2].sum() for _ in range(sims)]
    assert agrees(np.var(ends), noise.variance, sims)


@pytest.mark.parametrize(("n", "batch", "drop_last"), [(60, 5, False), (58, 5, False), (58, 5, True)])
def test_random_panels_are_unbiased(n, batch, drop_last):
    # Seed 2; 3000 panels: the mean must lie within 5 of its own standard errors.
    rng = np.random.default_rng(2)
    per_epoch = positions(n, batch, drop_last=drop_last)
    matrix = signal_matrix(rng, n, per_epoch)
    sampler = ShuffledEpochs(n, batch, drop_last)
    truth = naive_shuffled(matrix, batch, 1, drop_last)
    full = shuffled_noise(
        panel_of(matrix, batch, 1, samples=np.arange(n), grid=np.arange(per_epoch), drop_last=drop_last), sampler
    )
    found = []
    for _ in range(3000):
        samples = rng.choice(n, 9, replace=False)
        grid = rng.choice(per_epoch, 4, replace=False)
        noise = shuffled_noise(panel_of(matrix, batch, 1, samples=samples, grid=grid, drop_last=drop_last), sampler)
        found.append((noise.variance, noise.between, noise.drift))
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    assert abs(mean[0] - truth) < 5 * error[0]
    # The two parts are cut at zero, which biases them a little upward; they only enter standard errors.
    assert mean[1] == pytest.approx(full.between, rel=0.1)
    assert mean[2] == pytest.approx(full.drift, rel=0.15)


def test_regular_grid_reads_a_smooth_drift_where_random_weights_overstate_it():
    rng = np.random.default_rng(3)
    n, batch = 200, 4
    per_epoch = n // batch
    time = np.linspace(0, 1, per_epoch)
    matrix = rng.normal(size=(n, 1)) * time + 0.3 * rng.normal(size=(n, 1)) * time**2
    sampler = ShuffledEpochs(n, batch)
    truth = naive_shuffled(matrix, batch, 1, False)
    for grid in (np.arange(2, per_epoch, 5), np.round(np.linspace(0, per_epoch - 1, 10)).astype(int)):
        panel = panel_of(matrix, batch, 1, samples=np.arange(n), grid=grid)
        assert shuffled_noise(panel, sampler, positions="regular").variance == pytest.approx(truth, rel=0.03)
        assert 1.05 < shuffled_noise(panel, sampler).variance / truth < 1.3


def test_panel_error_covers_the_spread_over_panels():
    # Seed 4, 2000 panels; the stated relative error is itself noisy, hence 15 %.
    rng = np.random.default_rng(4)
    matrix = signal_matrix(rng, 400, 20)
    sampler = ShuffledEpochs(400, 20)
    found = [
        shuffled_noise(panel_of(matrix, 20, 1, samples=rng.choice(400, 60, replace=False), grid=np.arange(20)), sampler)
        for _ in range(2000)
    ]
    variances = np.array([noise.variance for noise in found])
    stated = np.sqrt(np.mean([(noise.relative_error * noise.variance) ** 2 for noise in found]))
    assert variances.std() == pytest.approx(stated, rel=0.15)


def test_panel_may_change_samples_and_positions_and_skip_epochs():
    rng = np.random.default_rng(5)
    matrix = np.tile(signal_matrix(rng, 60, 12), (1, 3))
    sampler = ShuffledEpochs(60, 5)
    full = shuffled_noise(panel_of(matrix, 5, 3, samples=np.arange(60), grid=np.arange(12)), sampler)
    one = shuffled_noise(panel_of(matrix, 5, 1, samples=np.arange(60), grid=np.arange(12)), sampler, epochs=3)
    assert one.variance == pytest.approx(full.variance)
    assert "Scaled from 1 to 3" in one.note
    halves = panel_of(
        matrix, 5, 2, samples=lambda e: np.arange(30 * e, 30 * e + 30), grid=lambda e: np.arange(e, 12, 2)
    )
    changing = shuffled_noise(halves, sampler, epochs=3)
    assert changing.per_sample is None
    assert changing.variance == pytest.approx(full.variance, rel=0.5)
    with pytest.raises(InputError, match="2 epochs but the run 1"):
        shuffled_noise(halves, sampler, epochs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [column[:-1] for column in c], "ragged in epoch 1"),
        (lambda c: [c[0], c[1] + 9, c[2], c[3]], "position 18 is outside 0 to 11"),
        (lambda c: [c[0], c[1], c[2] + 58, c[3]], "sample code 61 is outside"),
        (lambda c: [c[0], c[1], c[2], np.where(np.arange(len(c[3])) == 3, np.nan, c[3])], "is nan"),
        (lambda c: [column[:0] for column in c], "panel is empty"),
        (lambda c: [c[0], c[1], c[2], c[3][1:]], "they must agree"),
        (lambda c: [column[c[2] == 0] for column in c], "one sample"),
        (lambda c: [column[c[1] == 0] for column in c], "one position"),
    ],
)
def test_bad_panels(change, message):
    matrix = signal_matrix(np.random.default_rng(6), 60, 24)
    epoch, position, code, value = change(panel_arrays(matrix, 5, 2, samples=np.arange(4), grid=np.arange(0, 12, 3)))
    with pytest.raises(InputError, match=message) as error:
        shuffled_noise(Panel.from_flat(epoch, position, code=code, value=value), ShuffledEpochs(60, 5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("n", "b"), [(1, 1), (10, 0), (10, 11)])
def test_bad_samplers(n, b):
    with pytest.raises(InputError):
        ShuffledEpochs(n, b)


def replacement_run(rng, matrix, b):
    n, steps = matrix.shape
    codes = rng.integers(0, n, (steps, b))
    step = np.repeat(np.arange(steps), b)
    return step, codes.ravel(), matrix[codes.ravel(), step]


def test_with_replacement_noise_is_the_simulated_variance():
    rng = np.random.default_rng(7)
    n, b, steps, sims = 40, 6, 12, 4000
    matrix = signal_matrix(rng, n, steps)
    truth = float((b * matrix.var(axis=0)).sum())
    sums, stated, shares = [], [], np.zeros(n)
    for _ in range(sims):
        step, code, value = replacement_run(rng, matrix, b)
        noise = with_replacement_noise(step, code, value=value, n_samples=n)
        assert noise.per_sample is not None
        sums.append(value.sum())
        stated.append(noise.variance)
        shares += noise.per_sample / sims
    assert agrees(np.var(sums), truth, sims)
    assert abs(np.mean(stated) - truth) < 5 * np.std(stated) / sims**0.5
    assert shares.sum() == pytest.approx(np.mean(stated))
    own = b / n * ((matrix - matrix.mean(0)) ** 2).sum(1)
    assert np.corrcoef(shares, own)[0, 1] > 0.95


@pytest.mark.parametrize(("weights", "slack"), [("expected", 0.0), ("actual", 0.05)])
def test_poisson_noise_is_the_simulated_variance(weights, slack):
    # With the actual batch size the formula is first order in 1/b: 5 % on top at b = 30.
    rng = np.random.default_rng(8)
    n, b, steps, sims = 200, 30, 6, 3000
    matrix = signal_matrix(rng, n, steps)
    p = b / n
    level = 0 if weights == "expected" else matrix.mean(0)
    truth = float((p * (1 - p) * (matrix - level) ** 2).sum())
    sums, stated = [], []
    for _ in range(sims):
        chosen = rng.random((steps, n)) < p
        step, code = np.nonzero(chosen)
        value = matrix[code, step]
        if weights == "actual":
            value = value * b / chosen.sum(1)[step]
        sums.append(value.sum())
        noise = poisson_noise(step, code, value=value, n_samples=n, rate=p, weights=weights)
        stated.append(noise.variance)
    assert agrees(np.var(sums), truth, sims, slack=slack)
    assert np.mean(stated) == pytest.approx(truth, rel=0.01 + slack)


def test_poisson_refuses_an_impossible_rate():
    with pytest.raises(InputError, match=r"rate is 1.5"):
        poisson_noise([0, 0], [0, 1], value=[1.0, 2.0], n_samples=2, rate=1.5)


def test_successive_noise_without_drift_is_the_shuffled_variance():
    # Signals of every epoch follow the same matrix, so the differences see the variance over positions alone.
    rng = np.random.default_rng(9)
    n, b, epochs, sims = 120, 8, 12, 300
    matrix = np.tile(signal_matrix(rng, n, n // b), (1, epochs))
    panel = panel_of(matrix, b, epochs, samples=np.arange(n), grid=np.arange(n // b))
    truth = shuffled_noise(panel, ShuffledEpochs(n, b))
    assert truth.per_sample is not None
    found = []
    for _ in range(sims):
        step, code, value = shuffle_run(rng, matrix, b, epochs)
        found.append(successive_noise(step, code, value=value, n_samples=n))
    assert np.mean([noise.variance for noise in found]) == pytest.approx(truth.variance, rel=0.03)
    assert np.mean([noise.between for noise in found]) == pytest.approx(truth.between, rel=0.03)
    assert np.mean([noise.drift for noise in found]) == pytest.approx(truth.drift, rel=0.1)
    shares = np.mean([noise.per_sample for noise in found], axis=0)
    assert np.corrcoef(shares, truth.per_sample)[0, 1] > 0.9


def test_successive_noise_bounds_from_above_under_drift_and_with_one_epoch():
    rng = np.random.default_rng(10)
    n, b, epochs = 120, 8, 6
    level = np.repeat(rng.normal(size=(n, epochs)), n // b, axis=1) / n
    matrix = signal_matrix(rng, n, epochs * n // b, rows=0) + level
    panel = panel_of(matrix, b, epochs, samples=np.arange(n), grid=np.arange(n // b))
    truth = shuffled_noise(panel, ShuffledEpochs(n, b)).variance
    step, code, value = shuffle_run(rng, matrix, b, epochs)
    assert successive_noise(step, code, value=value, n_samples=n).variance > 1.5 * truth
    first = step < n // b
    single = successive_noise(step[first], code[first], value=value[first], n_samples=n)
    bound = with_replacement_noise(step[first], code[first], value=value[first], n_samples=n)
    assert single.variance == bound.variance > truth / epochs
    assert "One epoch" in single.note


def test_successive_variances_equal_a_loop():
    rng = np.random.default_rng(11)
    step = rng.permutation(np.repeat(np.arange(30), 4))
    code = rng.integers(0, 9, 120)
    keep = np.unique(step * 100 + code, return_index=True)[1]
    step, code = step[keep], code[keep]
    value = rng.normal(size=len(step))
    own, pairs, visits = successive_variances(step, code, value=value, n_samples=11)
    for sample in range(9):
        order = np.argsort(step[code == sample])
        series = value[code == sample][order]
        assert visits[sample] == len(series)
        assert pairs[sample] == len(series) - 1
        assert own[sample] == pytest.approx(np.mean(np.diff(series) ** 2) / 2)
    assert visits[9:].sum() == 0
    assert own[9] == own[10] == pytest.approx(own[:9] @ pairs[:9] / pairs.sum())


def test_moderate_shrinks_noise_away_and_keeps_real_differences():
    rng = np.random.default_rng(12)
    same = rng.chisquare(4, 5000) / 4
    assert moderate(same, 4).std() < 0.25 * same.std()
    different = np.repeat([1.0, 20.0], 2500) * rng.chisquare(40, 5000) / 40
    assert np.corrcoef(moderate(different, 40), different)[0, 1] > 0.999
    assert moderate(different, 40).std() > 0.85 * different.std()
    assert moderate(different, 40).mean() == pytest.approx(different.mean())


def test_spread_shares_one_variance_in_the_proportions_of_another():
    total = Noise(8.0, None, "shuffled", "n.")
    shared = spread(total, Noise(1.0, np.array([0.1, 0.3, 0.6]), "successive", ""))
    np.testing.assert_allclose(shared.per_sample, [0.8, 2.4, 4.8])
    assert shared.variance == 8.0
    with pytest.raises(InputError, match="no per-sample"):
        spread(total, total)


def test_noise_refuses_impossible_variances():
    with pytest.raises(InputError, match="-1"):
        Noise(-1.0, None, "x", "")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0, 0], [0, 1], [1.0]), "they must agree"),
        (([0, 0], [0, 5], [1.0, 2.0]), "sample code 5"),
        (([0, 0], [0, 1], [1.0, np.inf]), "sample 1 at step 0 is inf"),
        (([0, 1], [0, 1], [1.0, 2.0]), "every batch has one sample"),
        (([0.0, 1.0], [0, 1], [1.0, 2.0]), "dtype float64"),
        (([], [], []), "dtype float64"),
    ],
)
@pytest.mark.parametrize("method", [with_replacement_noise, successive_noise])
def test_bad_signals(arrays, message, method):
    step, code, value = arrays
    with pytest.raises(InputError, match=message):
        method(step, code, value=value, n_samples=3)
