"""Estimators of mu: coverage of every interval by simulation, bias, invariances, and fast forms against naive loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from finfluence.errors import InputError
from finfluence.tradeoff import ESTIMATORS, compare, gaussian_estimates, noncentrality
from finfluence.tradeoff.ranks import RankLaw, largest, middle, pooled_counts, superiority, threshold_mus

MUS = (-2.0, -0.3, 0.0, 0.3, 2.0)
RUNS = (16, 64, 256)


def pairs(seed: int, repetitions: int, n: int, mu: float):
    rng = np.random.default_rng([seed, n, int(10 * mu) + 100])
    return rng.normal(3.0, 2.0, (repetitions, n)), rng.normal(3.0 + 2.0 * mu, 2.0, (repetitions, n))


@pytest.mark.parametrize("n", RUNS)
def test_gaussian_interval_covers(n):
    # Seed 10; 4,000 repetitions a cell, 4.5 binomial standard deviations: 1e-5 to fail in each of 30 comparisons.
    for mu in MUS:
        estimates = gaussian_estimates(*pairs(10, 4_000, n, mu))
        for level in (0.8, 0.95):
            low, high = estimates.interval(level)
            tolerance = 4.5 * math.sqrt(level * (1 - level) / 4_000)
            assert np.mean((low <= mu) & (mu <= high)) == pytest.approx(level, abs=tolerance), mu


@pytest.mark.parametrize("n", RUNS)
def test_gaussian_estimate_is_unbiased_and_its_error_is_right(n):
    # Seed 11; 10,000 repetitions: mean within 4.5 standard errors (1e-5 to fail), se within 5 % of the spread (1e-9).
    for mu in MUS:
        estimates = gaussian_estimates(*pairs(11, 10_000, n, mu))
        spread = estimates.mu.std()
        assert estimates.mu.mean() == pytest.approx(mu, abs=4.5 * spread / 100)
        assert math.sqrt(np.mean(estimates.se**2)) == pytest.approx(spread, rel=0.05)
        assert math.sqrt(2 / n * (1 + mu**2 / 8)) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("n", [4, 16, 64])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99])
def test_pairs_are_covered_and_their_error_is_right(n, correlation):
    """Intervals of pairs cover at any correlation, p-values are exact without influence, and the error is smaller."""
    # Seed 21; 4,000 repetitions: 4.5 binomial standard deviations are 1.6 %, and 2 % more for the approximate degrees
    # of freedom (3 % of four pairs, whose correlation is hardly known).
    for mu in (0.0, 0.3, 2.0, 8.0):
        p, noise = pairs(21, 4_000, n, 0.0)
        q = 3 + correlation * (p - 3) + math.sqrt(1 - correlation**2) * (noise - 3) + 2 * mu
        estimates = gaussian_estimates(p, q, paired=True)
        low, high = estimates.interval(0.95)
        assert np.mean((low <= mu) & (mu <= high)) == pytest.approx(0.95, abs=0.046 if n == 4 else 0.036), mu
        spread = estimates.mu.std()
        assert estimates.mu.mean() == pytest.approx(
            mu, abs=4.5 * spread / math.sqrt(4_000) + (0.06 * mu if n == 4 else 0.01 * mu)
        )
        if n > 4:
            assert math.sqrt(np.mean(estimates.se**2)) == pytest.approx(spread, rel=0.3 if n < 64 else 0.06)
        if mu == 0.0:
            assert stats.kstest(estimates.p_value, "uniform").pvalue > 1e-5
            assert np.median(high - low) < 1.1 * math.sqrt(1 - correlation) * np.median(
                np.diff(gaussian_estimates(p, noise).interval(0.95), axis=0)
            ) * (1.5 if n == 4 else 1.0)


def test_one_pair_of_samples_is_a_paired_t_test():
    rng = np.random.default_rng(22)
    p = rng.normal(3, 2, 12)
    q = p + rng.normal(0.4, 0.5, 12)
    found = compare(p, q, paired=True)
    assert found.p_value == pytest.approx(stats.ttest_rel(q, p).pvalue)
    assert found.p_harmful == pytest.approx(stats.ttest_rel(q, p, alternative="less").pvalue)
    independent = compare(p, q)
    low, high = found.interval(0.95)
    assert high - low < 0.6 * np.diff(independent.interval(0.95))[0]
    assert found.mu == pytest.approx(independent.mu, rel=0.05)
    alike = compare(p, p, paired=True)
    assert (alike.mu, alike.p_value) == (0, 1)
    assert alike.interval(0.95) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("estimator", ["rank", "median", "max"])
def test_rank_based_intervals_cover(estimator):
    # Seed 12; 200 repetitions a cell. Spread of a cell's coverage: binomial and 0.6 % for the finite bootstrap. 4.3 of
    # them either way: 2e-5 to fail in each of 15 cells; their mean within 4.3 of its own.
    repetitions, coverage = 200, []
    spread = math.sqrt(0.95 * 0.05 / repetitions + 0.006**2)
    for n in RUNS:
        for mu in MUS:
            covered = 0
            for p, q in zip(*pairs(12, repetitions, n, mu), strict=True):
                low, high = compare(p, q, estimator).interval(0.95)
                covered += low <= mu <= high
            coverage.append(covered / repetitions)
            assert coverage[-1] == pytest.approx(0.95, abs=4.3 * spread), (n, mu)
    assert np.mean(coverage) == pytest.approx(0.95, abs=4.3 * spread / math.sqrt(len(coverage)))


@pytest.mark.parametrize("n", RUNS)
def test_clopper_pearson_bounds_hold(n):
    # Seed 13; 300 repetitions a cell: at least 80 % less 4.5 binomial standard deviations (5e-6 to fail in each cell).
    informative = []
    for mu in MUS:
        covered = bounded = 0
        for p, q in zip(*pairs(13, 300, n, mu), strict=True):
            g = compare(p, q, "clopper-pearson")
            low, high = g.interval(0.8)
            covered += low <= mu <= high
            bounded += abs(g.mu) <= abs(mu) and g.mu * mu >= 0
            if abs(mu) == 2:
                informative.append(abs(g.mu))
        assert covered / 300 >= 0.8 - 4.5 * math.sqrt(0.16 / 300)
        assert bounded / 300 >= 0.95 - 4.5 * math.sqrt(0.05 * 0.95 / 300)
    # A bound that is always 0 would hold too: it must say something at mu = 2 from 64 runs on.
    assert n == 16 or np.mean(informative) > 0.7


def test_max_is_biased_upward_and_the_median_is_not():
    # Seed 14; 2,000 repetitions at n = 200, mu = 0. sd of |max| about 0.16 and of the median 0.10: 4.5 standard errors.
    sums = {"max": [], "median": []}
    for p, q in zip(*pairs(14, 2000, 200, 0.0), strict=True):
        below_p, below_q, _ = pooled_counts(p, q)
        mus = threshold_mus(below_p, below_q, 200, 200)
        sums["max"].append(abs(float(largest(mus))))
        sums["median"].append(float(middle(mus)))
    assert np.mean(sums["max"]) == pytest.approx(0.56, abs=0.025)
    assert np.mean(sums["median"]) == pytest.approx(0.0, abs=4.5 * 0.105 / math.sqrt(2000))


@pytest.mark.parametrize("estimator", ["gaussian", "rank", "median", "max"])
def test_p_value_is_uniform_without_influence(estimator):
    # Seed 15; 1,000 repetitions at n = 32: share below 0.1 within 4.5 spreads (binomial and 0.8 % for the bootstrap).
    p_values = [compare(p, q, estimator).p_value for p, q in zip(*pairs(15, 1000, 32, 0.0), strict=True)]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=4.5 * math.sqrt(0.09 / 1000 + 0.008**2))


def test_unequal_numbers_of_runs_are_covered():
    # Seed 16; 400 repetitions with 12 and 40 runs, 4.5 spreads (1e-5 to fail an estimator).
    rng = np.random.default_rng(16)
    for estimator in ("gaussian", "rank", "median", "max"):
        covered = 0
        for _ in range(400):
            low, high = compare(rng.normal(size=12), rng.normal(size=40) - 0.8, estimator).interval(0.9)
            covered += low <= -0.8 <= high
        assert covered / 400 == pytest.approx(0.9, abs=4.5 * math.sqrt(0.09 / 400 + 0.008**2)), estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_swapping_the_samples_flips_the_sign(estimator):
    rng = np.random.default_rng(17)
    p, q = rng.normal(size=40), rng.normal(size=40) + 1.5
    forward, backward = compare(p, q, estimator), compare(q, p, estimator)
    assert forward.mu > 0
    assert backward.mu == pytest.approx(-forward.mu)
    # The bootstrap draws of the two directions differ, hence the tolerance of the interval.
    assert backward.interval() == pytest.approx([-end for end in forward.interval()[::-1]], abs=0.05)
    assert backward.p_harmful == pytest.approx(forward.p_supporting, rel=1.0)


@pytest.mark.parametrize("estimator", ["rank", "median", "max", "clopper-pearson"])
def test_rank_estimators_ignore_increasing_functions(estimator):
    rng = np.random.default_rng(18)
    p, q = rng.normal(size=30), rng.normal(size=25) + 1
    assert compare(p, q, estimator).mu == compare(np.exp(p), np.exp(q), estimator).mu


@given(st.floats(0.01, 100), st.floats(-100, 100))
def test_gaussian_ignores_unit_and_origin(unit, origin):
    rng = np.random.default_rng(19)
    p, q = rng.normal(size=20), rng.normal(size=20) + 1
    assert compare(unit * p + origin, unit * q + origin).mu == pytest.approx(compare(p, q).mu, rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_complete_separation_gives_a_finite_mu_and_an_interval_that_admits_ignorance(estimator):
    p, q = np.arange(16.0), np.arange(16.0) - 100
    g = compare(p, q, estimator)
    low, high = g.interval()
    assert math.isfinite(g.mu)
    assert math.isfinite(g.se)
    assert g.mu < 0
    assert high < 0
    assert g.p_harmful < 0.01
    if estimator != "gaussian":
        assert low == -math.inf
        assert "at most" in str(g)


small = st.lists(st.integers(-3, 3), min_size=3, max_size=10)


@given(small, small)
def test_superiority_and_threshold_counts_equal_naive_loops(p, q):
    wins = sum((y > x) + (y == x) / 2 for x in p for y in q) / (len(p) * len(q))
    assert superiority(np.array(p, float), np.array(q, float)) == pytest.approx(wins)
    below_p, below_q, thresholds = pooled_counts(np.array(p, float), np.array(q, float))
    for a, b, tau in zip(below_p, below_q, thresholds, strict=True):
        assert a == sum(x <= tau for x in p)
        assert b == sum(y <= tau for y in q)


@settings(max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=15), st.lists(st.floats(-3, 3), min_size=6, max_size=15))
def test_threshold_mus_equal_a_naive_loop(p, q):
    below_p, below_q, _ = pooled_counts(np.array(p), np.array(q))
    expected = []
    for tau in sorted({*p, *q})[:-1]:
        alpha, beta = np.mean(np.array(p) > tau), np.mean(np.array(q) <= tau)
        if 0 < alpha < 1 and 0 < beta < 1:
            expected.append(stats.norm.ppf(1 - alpha) - stats.norm.ppf(beta))
    if expected:
        mus = threshold_mus(below_p, below_q, len(p), len(q))
        assert np.sort(mus[~np.isnan(mus)]) == pytest.approx(np.sort(expected), abs=1e-8)
        assert float(middle(mus)) == pytest.approx(np.median(expected), abs=1e-8)
        assert abs(float(largest(mus))) == pytest.approx(np.max(np.abs(expected)), abs=1e-8)


def test_batch_equals_one_pair_at_a_time():
    rng = np.random.default_rng(20)
    shared, q = rng.normal(size=12), rng.normal(size=(3, 4, 20)) + 0.5
    batch = gaussian_estimates(shared, q)
    low, high = batch.interval(0.9)
    assert batch.mu.shape == (3, 4)
    for index in np.ndindex(3, 4):
        one = compare(shared, q[index])
        assert (batch.mu[index], batch.se[index]) == pytest.approx((one.mu, one.se))
        assert (low[index], high[index]) == pytest.approx(one.interval(0.9))
        assert batch.p_value[index] == pytest.approx(stats.ttest_ind(shared, q[index]).pvalue)
        assert one.p_value == pytest.approx(batch.p_value[index])


def test_noncentrality_inverts_the_noncentral_t():
    """Against the distribution function by a fine trapezium, for small and absurdly large t."""
    for df in (4, 30, 510, 20_000):
        s = np.linspace(max(1e-9, 1 - 12 / math.sqrt(2 * df)), 1 + 12 / math.sqrt(2 * df), 200_001)
        density = np.exp((df - 1) * np.log(s) - df * (s**2 - 1) / 2)
        density /= density.sum()
        for t in (-300.0, -2.0, 0.0, 0.5, 6.0, 40.0, 5000.0):
            for p in (0.001, 0.025, 0.5, 0.975, 0.999):
                delta = float(noncentrality(p, df, t))
                assert np.sum(density * special.ndtr(t * s - delta)) == pytest.approx(p, rel=2e-3), (df, t, p)


def test_same_data_give_the_same_interval():
    assert RankLaw("rank", 0.5, 20, 20).interval(0.95) == RankLaw("rank", 0.5, 20, 20).interval(0.95)


def test_contradicting_thresholds_keep_the_stronger_bound():
    """Q far wider than P: high thresholds say mu > 0 and low ones mu < 0, so no Gaussian mu fits."""
    rng = np.random.default_rng(21)
    low, high = compare(rng.normal(size=500), rng.normal(size=500) * 50, "clopper-pearson").interval()
    assert (low > 0 and high == math.inf) or (high < 0 and low == -math.inf)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bad_input_names_the_value_and_the_remedy(estimator):
    good = [1.0, 2.0, 3.0]
    with pytest.raises(InputError, match=r"losses_with holds 2 value.*at least 3"):
        compare([1.0, 2.0], good, estimator)
    with pytest.raises(InputError, match="losses_without holds 1 NaN"):
        compare(good, [1.0, float("nan"), 2.0], estimator)
    with pytest.raises(InputError, match="one dimension"):
        compare([good, good], good, estimator)
    with pytest.raises(InputError, match="not an array of numbers"):
        compare(["a", "b", "c"], good, estimator)
    with pytest.raises(InputError, match="seed"):
        compare([1.0] * 5, [2.0] * 5, estimator)


def test_what_cannot_be_paired():
    values = np.arange(5.0)
    with pytest.raises(InputError, match="takes no pairs"):
        compare(values, values + 1, "rank", paired=True)
    for n, m in ((5, 4), (3, 3)):
        with pytest.raises(InputError, match=f"at least 4; got {n} and {m}"):
            compare(values[:n], values[:m] + 1, paired=True)


def test_unknown_estimator_and_shapes_that_do_not_broadcast():
    with pytest.raises(InputError, match=r"estimator is 'mean'.*gaussian, rank"):
        compare([1, 2, 3], [1, 2, 3], "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="must broadcast"):
        gaussian_estimates(np.zeros((2, 5)), np.zeros((3, 5)))
