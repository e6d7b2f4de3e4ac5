"""Choosing the lowest of noisy estimates: the naive sum is too extreme, the shrunk one is not, and its band covers.

All simulations are seeded. The bounds leave four standard errors of the simulation's own mean, so that a correct method
would fail one of the cases here with a probability below 0.001 under another seed.
"""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.workflows.shrinkage import shrink

RUNS = 30
ROWS = 600


def truth(kind: str, generator: np.random.Generator) -> np.ndarray:
    if kind == "null":
        return np.zeros(ROWS)
    if kind == "normal":
        return generator.normal(0.0, 0.1, ROWS)
    if kind == "sparse":
        return np.where(generator.random(ROWS) < 0.03, generator.normal(-0.5, 0.1, ROWS), 0.0)
    # what a run with a tenth of wrong labels looks like: a long tail below, the rest a little above 0
    wrong = generator.random(ROWS) < 0.1
    found = np.where(wrong, -generator.gamma(4.0, 0.12, ROWS), generator.normal(0.03, 0.05, ROWS))
    return found - found.mean()


@pytest.mark.parametrize("kind", ["null", "normal", "sparse", "wrong labels"])
def test_the_sum_of_the_lowest_is_unbiased_and_covered(kind: str) -> None:
    generator = np.random.default_rng(7)
    share = ROWS // 10
    errors, naive, bands = np.empty(RUNS), np.empty(RUNS), np.empty(RUNS)
    for run in range(RUNS):
        mu = truth(kind, generator)
        se = 0.1 * np.exp(generator.normal(0.0, 0.2, ROWS))
        estimate = mu + se * generator.normal(size=ROWS)
        lowest = np.argsort(estimate)[:share]
        found = shrink(estimate, se)
        errors[run] = found.mean[lowest].sum() - mu[lowest].sum()
        bands[run] = found.sum_error(lowest)
        naive[run] = estimate[lowest].sum() - mu[lowest].sum()
    # the winner's curse is many standard errors of the sum
    assert naive.mean() < -2
    # a fifteenth of it may be left where there is nothing to learn the prior from
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(RUNS) + abs(naive.mean()) / 15
    # of 30 bands with a true coverage of 95 %, fewer than 24 cover with a probability of 0.0004
    assert (np.abs(errors) < 1.96 * bands).sum() >= 24
    # and they are no wider than needed
    assert bands.mean() < 2.5 * errors.std() + 0.1


def test_posterior_of_a_normal_prior_is_the_textbook_one() -> None:
    generator = np.random.default_rng(0)
    mu = generator.normal(0.2, 0.3, 4000)
    estimate = mu + 0.2 * generator.normal(size=4000)
    found = shrink(estimate, np.full(4000, 0.2))
    share = 0.3**2 / (0.3**2 + 0.2**2)
    # within the range that holds 95 % of the estimates, where the prior is well known
    inner = np.abs(estimate - 0.2) < 0.7
    assert np.abs(found.mean - (0.2 + share * (estimate - 0.2)))[inner].max() < 0.05
    assert np.sqrt(found.variance[inner]).mean() == pytest.approx(np.sqrt(share) * 0.2, rel=0.1)


def test_probability_of_the_sign_is_calibrated() -> None:
    generator = np.random.default_rng(1)
    mu = generator.normal(0.0, 0.1, 5000)
    found = shrink(mu + 0.1 * generator.normal(size=5000), np.full(5000, 0.1))
    sure = found.below > 0.9
    assert sure.sum() > 200
    assert (mu[sure] < 0).mean() == pytest.approx(found.below[sure].mean(), abs=0.06)


def test_rows_without_influence_are_on_neither_side() -> None:
    """Errors that are larger than what they are errors of: nothing is sure to work, in either direction."""
    estimate = 0.05 * np.random.default_rng(4).normal(size=500)
    found = shrink(estimate, np.full(500, 0.1))
    assert found.below.max() < 0.6
    assert found.above.max() < 0.6
    assert (found.below + found.above <= 1 + 1e-9).all()
    mirrored = shrink(-estimate, np.full(500, 0.1))
    np.testing.assert_allclose(mirrored.above, found.below, atol=0.02)


def test_few_estimates_get_one_normal_prior() -> None:
    generator = np.random.default_rng(2)
    estimate = generator.normal(0.0, 1.0, 10)
    found = shrink(estimate, np.full(10, 1.0))
    assert np.abs(found.mean - found.mean.mean()).max() < np.abs(estimate - estimate.mean()).max()
    wide = shrink(10 * estimate, np.full(10, 0.01))
    assert wide.mean == pytest.approx(10 * estimate, rel=1e-3, abs=1e-3)


def test_missing_estimates_stay_missing_and_bad_ones_are_refused() -> None:
    found = shrink([0.1, np.nan, -0.1], [0.1, np.nan, 0.1])
    assert np.isnan(found.mean).tolist() == [False, True, False]
    with pytest.raises(InputError, match="no estimate"):
        shrink([np.nan], [0.1])
    with pytest.raises(InputError, match="not positive"):
        shrink([0.1], [0.0])
    with pytest.raises(InputError, match="shapes"):
        shrink([0.1, 0.2], [0.1])
