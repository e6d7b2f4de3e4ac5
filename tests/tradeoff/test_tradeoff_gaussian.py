"""GaussianInfluence: its formulas against simulation and closed forms, text and validation."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from finfluence.errors import InputError
from finfluence.tradeoff import SIGN_CONVENTION, GaussianInfluence, g_mu


@given(st.floats(-5, 5), st.floats(0.01, 3))
def test_default_interval_and_p_values_are_those_of_a_normal(mu, se):
    g = GaussianInfluence(mu, se)
    assert g.interval(0.9) == pytest.approx(stats.norm.interval(0.9, mu, se))
    assert g.p_value == pytest.approx(2 * stats.norm.sf(abs(mu) / se))
    assert g.p_supporting == pytest.approx(stats.norm.sf(mu / se))
    assert g.p_supporting + g.p_harmful == pytest.approx(1)


def test_known_mu_has_no_doubt():
    g = GaussianInfluence(0.8)
    assert g.interval() == (0.8, 0.8)
    assert (g.p_value, g.p_supporting, g.p_harmful) == (0.0, 0.0, 1.0)
    assert GaussianInfluence(0.0).p_value == 1.0


@given(st.floats(-4, 4), st.floats(0.001, 0.5))
def test_power_is_one_minus_the_tradeoff_function(mu, alpha):
    g = GaussianInfluence(mu)
    assert g.power(alpha) == pytest.approx(1 - float(g_mu(alpha, mu)), abs=1e-12)
    assert g.tradeoff([alpha, alpha])[1] == g_mu(alpha, mu)


def test_superiority_and_power_hold_for_simulated_retrainings():
    # Seed 2; 200,000 pairs, tolerance 5 binomial standard deviations (failure probability 1e-6 each).
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=200_000), rng.normal(size=200_000) - 0.7
    g = GaussianInfluence(-0.7)
    assert np.mean(q > p) == pytest.approx(g.superiority, abs=0.0056)
    assert np.mean(q < stats.norm.ppf(0.05)) == pytest.approx(g.power(0.05), abs=0.0056)


def test_retrainings_reach_the_power_they_promise():
    # Seed 3; 40,000 repetitions of a two-sided z-test, tolerance 5 binomial standard deviations plus the rounding up.
    rng = np.random.default_rng(3)
    runs = GaussianInfluence(-0.8).retrainings(alpha=0.05, power=0.8)
    assert runs == math.ceil(2 * ((1.959964 + 0.8416212) / 0.8) ** 2)
    z = rng.normal(-0.8 * math.sqrt(runs / 2), size=40_000)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.02)


def test_retrainings_edges():
    assert GaussianInfluence(0.0).retrainings() == math.inf
    assert GaussianInfluence(1e-300).retrainings() == math.inf
    assert GaussianInfluence(50.0).retrainings() == 1
    with pytest.raises(InputError, match=r"power is 0\.01"):
        GaussianInfluence(1.0).retrainings(0.05, 0.01)


def test_text_says_what_mu_means():
    assert str(GaussianInfluence(0.8, 0.1)) == (
        "mu = +0.80 ± 0.10 (95 % +0.60 to +1.00): "
        "supports the measured behaviour (removing these samples raises the measured loss)"
    )
    assert "works against" in str(GaussianInfluence(-0.8, 0.1))
    assert "not certain" in str(GaussianInfluence(0.1, 0.1))
    assert SIGN_CONVENTION.startswith("mu > 0: the samples support")


def test_bad_input_names_the_value():
    with pytest.raises(InputError, match="mu is nan"):
        GaussianInfluence(float("nan"))
    with pytest.raises(InputError, match="se is -1"):
        GaussianInfluence(0.0, -1.0)
    with pytest.raises(InputError, match="level is 95"):
        GaussianInfluence(0.0, 1.0).interval(95)
    with pytest.raises(InputError, match="choose one of two-sided, supporting, harmful"):
        GaussianInfluence(0.0, 1.0).p("greater")  # pyright: ignore[reportArgumentType]


def test_import_is_light():
    """scipy.stats takes half a second to import, torch several: neither may come with the floor."""
    code = "import sys, finfluence.tradeoff; print([m for m in ('torch', 'scipy.stats', 'polars') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
