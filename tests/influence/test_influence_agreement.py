"""Agreement with a truth of known noise: slope, ceiling and coverage come out as they were put in."""

import numpy as np
import pytest
from scipy import stats

from finfluence.errors import InputError
from finfluence.influence import Ceiling, agreement, ceiling, coverage

FLAT = Ceiling(0.9, 0.95, 0.97)


def test_ceiling_is_the_correlation_of_the_noiseless_truth():
    # Gaussian μ of sd 1, halves with error sd 0.8, the whole with 0.8/√2: reliability 1/(1 + 0.32). Seed 0, 200 × 200.
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(200, 200))
    a, b = (mu + 0.8 * rng.normal(size=mu.shape) for _ in range(2))
    found = ceiling(a, b)
    assert found.reliability == pytest.approx(1 / 1.32, abs=0.02)
    perfect = agreement(mu, (a + b) / 2, ceiling=found, resamples=20)
    assert perfect.spearman == pytest.approx(found.correlation, abs=0.02)


def test_ceiling_of_pure_noise_is_zero():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(3, 50))
    assert ceiling(a, -a).correlation == 0
    assert abs(ceiling(rng.normal(size=(50, 50)), rng.normal(size=(50, 50))).split_half) < 0.1


def test_spearman_is_scipys_mean_and_slope_is_known():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 25))
    x[:, :5] = np.round(x[:, :5])
    y = 1.3 * x + 0.2 + 0.3 * rng.normal(size=x.shape)
    found = agreement(x, y, ceiling=FLAT)
    assert found.spearman == pytest.approx(
        np.mean([stats.spearmanr(*rows).statistic for rows in zip(x, y, strict=True)])
    )
    assert found.slope == pytest.approx(stats.linregress(x.ravel(), y.ravel()).slope)
    assert found.slope_interval[0] < 1.3 < found.slope_interval[1]
    assert found.spearman_interval[0] < found.spearman < found.spearman_interval[1]
    assert (found.n_queries, found.n_subsets) == (30, 25)
    assert np.isnan(found.coverage)


def test_slope_interval_covers_when_errors_are_shared_within_subsets():
    # Seed 3: 100 repetitions, 40 subsets whose error the queries share; a percentile bootstrap covers under 95 %.
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        x = rng.normal(size=(5, 40)) + rng.normal(size=40)
        y = 0.9 * x + rng.normal(size=40) * 0.5
        low, high = agreement(x, y, ceiling=FLAT, resamples=100).slope_interval
        covered += low < 0.9 < high
    assert 0.84 < covered / 100 <= 1


def test_coverage_counts_both_errors():
    rng = np.random.default_rng(4)
    mu = rng.normal(size=(50, 400))
    x, y = mu + 0.5 * rng.normal(size=mu.shape), mu + 0.3 * rng.normal(size=mu.shape)
    both = agreement(
        x, y, ceiling=FLAT, estimated_se=np.full(mu.shape, 0.5), truth_se=np.full(mu.shape, 0.3), resamples=10
    )
    assert both.coverage == pytest.approx(0.95, abs=0.01)
    only = coverage(x, y, estimated_se=np.full(mu.shape, 0.5), truth_se=np.zeros(mu.shape), level=0.8)
    assert only < 0.75


def test_a_score_is_never_shown_without_its_ceiling():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, 10))
    found = agreement(x, x + 0.1 * rng.normal(size=x.shape), ceiling=FLAT, resamples=10)
    for text in (str(found), f"{found}", repr(found)):
        assert "0.97" in text
    with pytest.raises(TypeError):
        agreement(x, x)  # pyright: ignore


def test_constant_queries_are_left_out():
    x = np.array([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    y = np.array([[1.0, 2, 3, 4], [4, 2, 3, 1]])
    assert agreement(x, y, ceiling=FLAT, resamples=10).spearman == 1


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((2, 5)), np.ones((2, 4)), "shapes"),
        (np.ones((2, 2)), np.ones((2, 2)), "2 subsets"),
        (np.full((2, 5), np.nan), np.ones((2, 5)), "not finite"),
        (np.ones((2, 5)), np.ones((2, 5)), "all estimates are 1"),
    ],
)
def test_bad_agreement(x, y, message):
    with pytest.raises(InputError, match=message):
        agreement(x, y, ceiling=FLAT)


def test_bad_coverage():
    with pytest.raises(InputError, match="shape"):
        coverage([1.0], [1.0], estimated_se=[1.0, 2.0], truth_se=[1.0])
