"""Composition: Gaussian identities, tensor products against enumeration, and the central limit with its error."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finfluence.errors import InputError
from finfluence.tradeoff import (
    GaussianInfluence,
    TradeoffCurve,
    compose,
    g_mu,
    gaussian_limit,
    tensor_product,
)

influences = st.builds(GaussianInfluence, st.floats(-3, 3), st.floats(0, 1))
GRID = np.linspace(0, 1, 201)


@given(st.lists(influences, min_size=1, max_size=6))
def test_magnitude_is_the_root_of_the_sum_of_squares(parts):
    assert abs(compose(parts).mu) == pytest.approx(math.sqrt(sum(g.mu**2 for g in parts)), abs=1e-12)


@given(st.lists(influences, min_size=2, max_size=6), st.integers(1, 5))
def test_composition_is_associative_and_commutative(parts, cut):
    cut = min(cut, len(parts) - 1)
    nested = compose([compose(parts[:cut]), compose(parts[cut:])])
    assert abs(nested.mu) == pytest.approx(abs(compose(parts).mu), abs=1e-12)
    assert compose(parts[::-1]).se == pytest.approx(compose(parts).se, abs=1e-12)


@given(st.floats(0.01, 3), st.integers(1, 50))
def test_equal_steps_grow_with_the_root_of_their_number(mu, k):
    assert compose([GaussianInfluence(mu)] * k).mu == pytest.approx(mu * math.sqrt(k))
    assert compose([GaussianInfluence(-mu)] * k).mu == pytest.approx(-mu * math.sqrt(k))


def test_sign_is_that_of_the_larger_share_and_zero_is_neutral():
    assert compose([GaussianInfluence(1.0), GaussianInfluence(-2.0)]).mu == pytest.approx(-math.sqrt(5))
    assert compose([GaussianInfluence(0.0), GaussianInfluence(-2.0, 0.3)]) == GaussianInfluence(-2.0, 0.3)


def test_standard_error_is_that_of_simulated_estimates():
    # Seed 4; 200,000 draws: the sd is within 1 % with failure probability < 1e-9; second-order terms are below 1 %.
    rng = np.random.default_rng(4)
    draws = rng.normal([2.0, 1.0, 3.0], [0.1, 0.2, 0.05], size=(200_000, 3))
    g = compose([GaussianInfluence(2.0, 0.1), GaussianInfluence(1.0, 0.2), GaussianInfluence(3.0, 0.05)])
    assert g.se == pytest.approx(np.sqrt((draws**2).sum(axis=1)).std(), rel=0.02)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=4))
def test_tensor_product_of_gaussians_is_the_gaussian_of_compose(mus):
    product = tensor_product([TradeoffCurve.gaussian(mu) for mu in mus])
    total = compose([GaussianInfluence(mu) for mu in mus]).mu
    np.testing.assert_allclose(product(GRID), g_mu(GRID, total), atol=2e-4)


def test_tensor_product_of_discrete_laws_equals_enumeration():
    """Laws on three outcomes each: the product's trade-off function from all 27 outcomes, sorted by ratio."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    curve = TradeoffCurve(np.array([0, 0.2, 0.5, 1]), np.array([1, 0.5, 0.2, 0]))
    outcomes = list(itertools.product(range(3), repeat=3))
    pp = np.array([p[list(o)].prod() for o in outcomes])
    qq = np.array([q[list(o)].prod() for o in outcomes])
    order = np.argsort(-qq / pp)
    alphas, betas = np.append(0, np.cumsum(pp[order])), np.append(1, 1 - np.cumsum(qq[order]))
    product = tensor_product([curve] * 3, step=0.001)
    expected = np.interp(GRID, alphas, betas)
    np.testing.assert_allclose(product(GRID), expected, atol=1e-4)
    assert np.all(product(GRID) <= expected + 1e-9)


def test_tensor_product_keeps_what_only_one_law_takes():
    """f(0) = 0.7: Q shows an impossible outcome with probability 0.3, so twice with probability 1 - 0.49."""
    curve = TradeoffCurve(np.array([0, 0.0, 1.0]), np.array([1.0, 0.7, 0.0]))
    assert tensor_product([curve, curve])(0.0) == pytest.approx(0.49, abs=1e-9)
    perfect = TradeoffCurve(np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(tensor_product([perfect, curve])(GRID), 0, atol=1e-12)


def test_identity_is_neutral():
    coin = TradeoffCurve(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(tensor_product([coin, coin])(GRID), 1 - GRID, atol=1e-12)
    assert gaussian_limit([coin, coin]).mu == 0.0


@given(st.floats(0.05, 0.5), st.integers(1, 40))
def test_limit_of_gaussians_is_exact(mu, k):
    assert gaussian_limit([TradeoffCurve.gaussian(mu)] * k).mu == pytest.approx(mu * math.sqrt(k), rel=1e-3)


def test_product_of_many_small_steps_lies_within_the_limit_error():
    """Randomised response with epsilon 0.1: kl, kappa2, kappa3 in closed form, and the bounds of Theorem 3.5."""
    epsilon, k = 0.1, 100
    rate = 1 / (1 + math.exp(epsilon))
    curve = TradeoffCurve(np.array([0, rate, 1]), np.array([1, rate, 0]))
    limit = gaussian_limit([curve] * k)
    kl = epsilon * (1 - 2 * rate)
    variance = epsilon**2 - kl**2
    third = rate * abs(epsilon + kl) ** 3 + (1 - rate) * abs(epsilon - kl) ** 3
    assert limit.mu == pytest.approx(2 * k * kl / math.sqrt(k * variance))
    assert limit.error == pytest.approx(0.56 * k * third / (k * variance) ** 1.5)
    product = tensor_product([curve] * k, step=0.01)
    inside = GRID[(limit.error <= GRID) & (1 - limit.error >= GRID)]
    assert np.all(product(inside) >= g_mu(inside + limit.error, limit.mu) - limit.error)
    assert np.all(product(inside) <= g_mu(inside - limit.error, limit.mu) + limit.error)
    # The error itself shrinks with the root of k, and the real distance is smaller.
    np.testing.assert_allclose(product(GRID), g_mu(GRID, limit.mu), atol=0.03)


def test_bad_input_names_the_value():
    with pytest.raises(InputError, match="empty"):
        compose([])
    with pytest.raises(InputError, match="empty"):
        tensor_product([])
    with pytest.raises(InputError, match="step is -1"):
        tensor_product([TradeoffCurve.gaussian(1.0)], step=-1.0)
    with pytest.raises(InputError, match="at least"):
        tensor_product([TradeoffCurve.gaussian(1.0)], step=1e-6)
    lopsided = TradeoffCurve(np.array([0, 0.1, 1.0]), np.array([1, 0.6, 0]))
    with pytest.raises(InputError, match="differs from its inverse"):
        gaussian_limit([lopsided])
    with pytest.raises(InputError, match="only one"):
        gaussian_limit([TradeoffCurve(np.array([0, 0.0, 0.8, 1.0]), np.array([1.0, 0.8, 0.0, 0.0]))])
