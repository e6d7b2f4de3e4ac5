"""μ of a finite removal: placement is exchanged to first order, and the rest of the change is counted in full."""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.influence import (
    DerivativeError,
    InfluenceTable,
    Noise,
    SampleIndex,
    SampleTotals,
    finite_estimates,
    subset_estimates,
)

N, RNG = 40, np.random.default_rng(0)
NOISE = Noise(variance=4.0, per_sample=np.full(N, 0.1), method="shuffled", note="made up")
INDEX = SampleIndex(N)
ONES = np.ones(2)
PACKED = INDEX.pack({"few": [1, 5, 6], "many": list(range(20))})


def totals(centred: np.ndarray) -> SampleTotals:
    return SampleTotals(visits=np.full(N, 3.0), total=centred + 0.2, centred=centred, centre="others", batch=8.0)


COMPLETED = RNG.normal(size=N)
COMPLETED -= COMPLETED.mean()
PLACED = COMPLETED + RNG.normal(size=N) * 0.3
TABLE = InfluenceTable(INDEX, totals(COMPLETED), NOISE, replacement="exact")


def test_a_change_of_first_order_leaves_the_completed_estimate() -> None:
    """Where the path's change is what its batches add up to, the estimate is that of `subset_estimates`."""
    f = PACKED.sizes / N
    unit = 2.0 * np.sqrt((1 + 1 / (1 - f)) / 2)
    change = -(N - 1) / (N - PACKED.sizes) * PACKED.sums(PLACED)
    first = TABLE.subsets({"few": [1, 5, 6], "many": list(range(20))})
    none = DerivativeError()
    found = finite_estimates(TABLE, totals(PLACED), packed=PACKED, change=change, sensitivity=ONES, error=none)
    np.testing.assert_allclose(found.mu, first["mu"])
    np.testing.assert_allclose(found.se, first["se"])
    # and whatever it is beside is counted in full, in the unit of μ
    beyond = finite_estimates(TABLE, totals(PLACED), packed=PACKED, change=change + unit, sensitivity=ONES, error=none)
    np.testing.assert_allclose(beyond.mu, first["mu"].to_numpy() + 1)


def test_the_unit_is_the_pooled_noise_of_both_trainings() -> None:
    """A measurement that moves three times as much without a subset has three times the noise there."""
    change, ratio = np.array([3.0, -8.0]), np.array([3.0, 0.5])
    known = {"packed": PACKED, "change": change, "error": DerivativeError(path=1.0)}
    same = finite_estimates(TABLE, totals(PLACED), sensitivity=ONES, **known)
    found = finite_estimates(TABLE, totals(PLACED), sensitivity=ratio, **known)
    growth = N / (N - PACKED.sizes)
    expected = np.sqrt((1 + growth) / (1 + ratio**2 * growth))
    np.testing.assert_allclose(found.mu / same.mu, expected)
    np.testing.assert_allclose(found.se / same.se, expected)


def test_errors_of_the_path_and_of_the_unit() -> None:
    change = np.array([3.0, -8.0])
    error = DerivativeError(path=2.0, joint=0.25)
    found = finite_estimates(TABLE, totals(PLACED), packed=PACKED, change=change, sensitivity=ONES, error=error)
    along = subset_estimates(
        TABLE.totals, NOISE, packed=PACKED, removal=TABLE._removal, error=DerivativeError(path=2.0)
    )
    np.testing.assert_allclose(found.se**2, along.se**2 + (0.25 * found.mu) ** 2)
    assert found.null is not None
    np.testing.assert_allclose(found.null, along.se)


def test_a_table_without_noise_has_no_unit() -> None:
    bare = InfluenceTable(INDEX, totals(COMPLETED), estimator="tracin")
    with pytest.raises(InputError, match="units of the run's noise"):
        finite_estimates(
            bare, totals(PLACED), packed=PACKED, change=np.zeros(2), sensitivity=ONES, error=DerivativeError()
        )
