"""Pooling runs: averages, errors with and without differences between runs, alignment of rows."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from finfluence.errors import InputError
from finfluence.influence import attach, metadata, null_errors, pool, pool_estimates, report


def frame(names, mu, se, key="sample", **meta):
    return attach(pl.DataFrame({key: names, **report(mu, se)}), **meta)


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_intervals_cover(runs, spread):
    # Seed 0, 20,000 estimates: binomial standard error 0.0016; the docstring promises 93 % or more.
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(runs, 20_000)) * np.hypot(1, spread)
    mean, se, dof = pool_estimates(mu, np.ones_like(mu))
    columns = report(mean, se, dof=dof)
    covered = ((columns["ci_low"] < 0) & (columns["ci_high"] > 0)).mean()
    assert 0.925 < covered < 0.98


def test_two_runs_that_differ_cover_less_as_documented():
    rng = np.random.default_rng(1)
    mu = rng.normal(size=(2, 20_000)) * np.hypot(1, 3)
    mean, se, dof = pool_estimates(mu, np.ones_like(mu))
    columns = report(mean, se, dof=dof)
    assert ((columns["ci_low"] < 0) & (columns["ci_high"] > 0)).mean() == pytest.approx(0.87, abs=0.02)


def test_formula_in_both_regimes():
    mu, se, dof = pool_estimates([[1.0, 0.0], [1.2, 8.0], [0.8, 4.0]], np.full((3, 2), 0.5))
    np.testing.assert_allclose(mu, [1.0, 4.0])
    np.testing.assert_allclose(se, [0.5 / 3**0.5, 4 / 3**0.5])
    np.testing.assert_array_equal(dof, [np.inf, 2])


def test_frames_are_aligned_by_id_and_say_how_many_runs():
    a = frame(["x", "y", "z"], [1.0, 2.0, np.nan], [1.0, 1.0, np.nan], estimator="gaussian", sigma=3.0)
    b = frame(["z", "x", "y"], [5.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    found = pool([a, b])
    assert found.columns == a.columns
    assert found["sample"].to_list() == ["x", "y", "z"]
    assert found["mu"].to_list() == [2.0, 3.0, None]
    meta = metadata(found)
    assert meta["condition"] == "averaged over 2 runs"
    assert meta["estimator"] == "gaussian"
    assert "sigma" not in meta


def test_frames_without_errors_use_the_spread_alone():
    a, b = (frame([1, 2], mu, [np.nan, np.nan]) for mu in ([1.0, 2.0], [3.0, 2.5]))
    np.testing.assert_allclose(pool([a, b])["se"], [1.0, 0.25])


def test_bad_pools():
    a = frame([1, 2], [1.0, 2.0], [1.0, 1.0])
    for others, message in [
        ([], "1 run to pool"),
        ([frame([1, 3], [1.0, 2.0], [1.0, 1.0])], "run 1 has other samples"),
        ([frame([1], [1.0], [1.0])], "run 1 has other samples"),
        ([frame([1, 1], [1.0, 2.0], [1.0, 1.0])], "repeats samples"),
        ([frame(["1", "2"], [1.0, 2.0], [1.0, 1.0])], "another type"),
        ([frame([1, 2], [1.0, 2.0], [1.0, 1.0], key="group")], "run 1 has the columns"),
    ]:
        with pytest.raises(InputError, match=message):
            pool([a, *others])
    with pytest.raises(InputError, match="not an influence frame"):
        pool([pl.DataFrame({"a": [1]})] * 2)
    with pytest.raises(InputError, match="shapes"):
        pool_estimates([[1.0]], [[1.0, 2.0]])
    sized = [pl.DataFrame({"subset": ["a"], "size": [k], **report([1.0], [1.0])}) for k in (3, 4)]
    with pytest.raises(InputError, match="other sizes"):
        pool(sized)


def test_errors_that_runs_share_are_not_averaged_away():
    """Three runs that agree: their own errors shrink with the number of runs, what they err by together stays."""
    mu, own, shared = np.full((3, 2), 2.0), 0.3, np.array([0.0, 0.8])
    found, se, dof = pool_estimates(mu, np.sqrt(own**2 + np.tile(shared**2, (3, 1))), shared=np.tile(shared, (3, 1)))
    np.testing.assert_allclose(found, 2.0)
    np.testing.assert_allclose(se, np.sqrt(own**2 / 3 + shared**2))
    assert np.isinf(dof).all()
    # runs that differ: t with R − 1 degrees of freedom, and more the less of the error is theirs (Satterthwaite)
    mu = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]])
    _, se, dof = pool_estimates(mu, np.tile(np.hypot(own, shared), (3, 1)), shared=np.tile(shared, (3, 1)))
    np.testing.assert_allclose(se, np.sqrt(4 / 3 + shared**2))
    np.testing.assert_allclose(dof, 2 * ((4 / 3 + shared**2) / (4 / 3)) ** 2)


@pytest.mark.parametrize("alike", [0.4, 0.0], ids=["shared", "each run's own"])
def test_p_values_of_pooled_runs_leave_out_what_is_relative_to_mu(alike):
    """Against μ = 0 an error of 40 % of μ is none; in the interval it is, less by √3 where each run has its own."""
    frames = [
        attach(
            pl.DataFrame({"sample": [1, 2], **report(mu, np.hypot(0.1, 0.4 * mu), null=[0.1, 0.1])}),
            relative_error=0.4,
            shared_relative_error=alike,
        )
        for mu in (np.array([1.0, 0.0]), np.array([1.05, 0.1]), np.array([0.95, -0.1]))
    ]
    single, pooled = frames[0], pool(frames)
    assert single["p_value"][0] == pytest.approx(2 * stats.norm.sf(10), rel=1e-6)
    assert null_errors(single)[0] == pytest.approx(0.1)
    assert pooled["p_value"][0] < 1e-10
    left = 0.4 if alike else 0.4 / 3**0.5
    assert metadata(pooled)["relative_error"] == pytest.approx(left)
    assert pooled["se"][0] == pytest.approx(np.hypot(0.1 / 3**0.5, left), rel=0.01)
    assert pooled["p_value"][1] > 0.5
    assert null_errors(pooled)[0] == pytest.approx(0.1 / 3**0.5, rel=0.05)
