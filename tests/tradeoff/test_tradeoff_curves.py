"""G_mu, empirical trade-off curves and error budgets against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from finfluence.errors import InputError
from finfluence.tradeoff import TradeoffCurve, error_budget, g_mu, tradeoff_curve

mus = st.floats(-6, 6)
errors = st.floats(1e-6, 1 - 1e-6)


@given(errors, mus)
def test_g_mu_is_its_definition_and_ignores_the_sign(alpha, mu):
    expected = stats.norm.cdf(stats.norm.ppf(1 - alpha) - abs(mu))
    assert g_mu(alpha, mu) == pytest.approx(expected, abs=1e-9)
    assert g_mu(alpha, mu) == g_mu(alpha, -mu)


@given(errors, st.floats(-3, 3))
def test_g_mu_is_symmetric_and_never_better_than_certainty_or_worse_than_a_coin(alpha, mu):
    beta = g_mu(alpha, mu)
    assert 0 <= beta <= 1 - alpha + 1e-12
    assert g_mu(beta, mu) == pytest.approx(alpha, abs=1e-7)


@given(st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
def test_error_budget_is_the_mu_whose_curve_passes_through_it(alpha, beta):
    assert g_mu(alpha, error_budget(alpha, beta)) == pytest.approx(beta, rel=1e-6)


def test_error_budget_is_zero_where_a_coin_is_enough():
    assert error_budget(0.6, 0.5) == 0.0
    assert error_budget(0.05, 0.2) == pytest.approx(1.6448536 + 0.8416212, abs=1e-6)


@given(
    st.lists(st.integers(-4, 4), min_size=3, max_size=12),
    st.lists(st.integers(-4, 4), min_size=3, max_size=12),
    st.sampled_from(["above", "below"]),
)
def test_curve_equals_a_naive_loop_over_thresholds(p, q, direction):
    curve = tradeoff_curve(p, q, direction=direction)
    sign = 1 if direction == "above" else -1
    expected = {(1.0, 0.0)}
    for tau in p + q:
        alpha = sum(sign * x > sign * tau for x in p) / len(p)
        beta = sum(sign * y <= sign * tau for y in q) / len(q)
        expected.add((round(alpha, 9), round(beta, 9)))
    assert {(round(a, 9), round(b, 9)) for a, b in zip(*curve, strict=True)} == expected


def test_auto_direction_follows_the_shift():
    rng = np.random.default_rng(0)
    low, high = rng.normal(size=200), rng.normal(size=200) + 1
    assert tradeoff_curve(low, high)(0.2) == tradeoff_curve(low, high, direction="above")(0.2)
    assert tradeoff_curve(high, low)(0.2) == tradeoff_curve(high, low, direction="below")(0.2)


@settings(max_examples=50)
@given(st.lists(st.floats(-9, 9), min_size=3, max_size=20), st.lists(st.floats(-9, 9), min_size=3, max_size=20))
def test_hull_is_convex_and_the_largest_below(p, q):
    plain, hull = tradeoff_curve(p, q), tradeoff_curve(p, q, hull="convex")
    grid = np.linspace(0, 1, 41)
    assert np.all(hull(grid) <= plain(grid) + 1e-9)
    values = hull(grid)
    assert np.all(values[:-2] + values[2:] >= 2 * values[1:-1] - 1e-9)
    # Largest: every corner of the hull is a point of the plain curve.
    points = {(round(a, 9), round(b, 9)) for a, b in zip(*plain, strict=True)}
    assert all((round(a, 9), round(b, 9)) in points for a, b in zip(*hull, strict=True))


def test_curve_of_large_normal_samples_is_g_mu():
    # Seed 1; by the DKW inequality both empirical laws are within 0.006 with probability > 1 - 1e-5 (n = 200,000).
    rng = np.random.default_rng(1)
    curve = tradeoff_curve(rng.normal(size=200_000), rng.normal(size=200_000) + 0.8)
    alphas, betas = curve
    np.testing.assert_allclose(g_mu(np.clip(alphas + 0.006, 0, 1), 0.8) - 0.006 <= betas, True)
    np.testing.assert_allclose(g_mu(np.clip(alphas - 0.006, 0, 1), 0.8) + 0.006 >= betas, True)


def test_gaussian_polygon_lies_on_g_mu():
    grid = np.linspace(0, 1, 501)
    for mu in (0.0, 0.3, -2.0):
        difference = TradeoffCurve.gaussian(mu)(grid) - g_mu(grid, mu)
        assert difference.min() > -1e-12
        assert difference.max() < 1e-4


def test_bad_input_names_the_value():
    with pytest.raises(InputError, match="outside"):
        g_mu([0.1, 1.2], 1.0)
    with pytest.raises(InputError, match="mu is nan"):
        g_mu(0.1, float("nan"))
    with pytest.raises(InputError, match="alpha is 0"):
        error_budget(0.0, 0.1)
    with pytest.raises(InputError, match="direction is 'left'"):
        tradeoff_curve([1, 2, 3], [1, 2, 3], direction="left")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="rising"):
        TradeoffCurve(np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.5, 0.0]))
    with pytest.raises(InputError, match="shapes"):
        TradeoffCurve(np.array([0.0, 1.0]), np.array([0.2, 0.5, 0.0]))
