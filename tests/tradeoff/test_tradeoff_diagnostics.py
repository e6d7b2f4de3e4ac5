"""The normality and equal-variance diagnostics: calibrated without a fault, powerful with one."""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.tradeoff import gaussianity


def test_p_values_reject_normal_samples_at_their_level():
    # Seed 30; 1,000 repetitions at 40 runs: shares within 0.06 of nominal 0.1 from above (6 standard deviations).
    # Brown-Forsythe is slightly conservative, and the residuals are scaled by estimates: no lower limit but 0.05.
    rng = np.random.default_rng(30)
    results = [gaussianity(rng.normal(size=40), rng.normal(size=40) + 2) for _ in range(1000)]
    for p_values in ([r.normality_p for r in results], [r.variance_p for r in results]):
        assert 0.05 < np.mean(np.array(p_values) < 0.1) < 0.16


def test_faults_are_found_and_named():
    # Seed 31; power above 1 - 1e-6 for either fault at 200 runs.
    rng = np.random.default_rng(31)
    wide = gaussianity(rng.normal(size=200), 3 * rng.normal(size=200))
    assert wide.variance_p < 1e-6
    assert 2 < wide.sd_ratio < 4
    assert not wide.plausible()
    assert "rough summary" in str(wide)
    skewed = gaussianity(rng.exponential(size=200), rng.exponential(size=200))
    assert skewed.normality_p < 1e-6
    assert skewed.skewness > 1
    assert skewed.excess_kurtosis > 0


def test_large_samples_are_thinned_not_refused():
    rng = np.random.default_rng(32)
    result = gaussianity(rng.normal(size=9000), rng.normal(size=9000))
    assert result.plausible(1e-6)
    assert (result.n_with, result.n_without) == (9000, 9000)


def test_a_constant_sample_is_refused():
    with pytest.raises(InputError, match="losses_without does not vary"):
        gaussianity([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
