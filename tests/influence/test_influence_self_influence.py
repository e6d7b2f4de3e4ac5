"""Self-influence: units, references, and that samples of larger own gradients come first."""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.influence import SampleIndex, detection, metadata, self_influence


def signals_of(rng, n, epochs, level, sd):
    step = np.concatenate([epoch * n + rng.permutation(n) for epoch in range(epochs)])
    code = np.tile(np.arange(n), epochs)
    return step, code, -(level[code] + sd[code] * rng.normal(size=n * epochs))


def test_units_and_errors():
    # 400 samples with 30 visits of sd 2: v = 120, se near 1; |z| of the estimate against the known level is normal.
    rng = np.random.default_rng(0)
    level = rng.exponential(size=400)
    step, code, value = signals_of(rng, 400, 30, level, np.full(400, 2.0))
    frame = self_influence(SampleIndex(400), step, code=code, value=value)
    sigma = 120**0.5
    error = (frame["mu"].to_numpy() - 30 * level / sigma) / frame["se"].to_numpy()
    assert frame["se"].mean() == pytest.approx(1, abs=0.05)
    assert error.std() == pytest.approx(1, abs=0.12)
    total = -np.bincount(code, weights=value)
    np.testing.assert_allclose(frame["mu"].to_numpy() * sigma, total, rtol=0.05)
    assert (np.argsort(frame["mu"].to_numpy()) == np.argsort(total)).all()


def test_large_own_gradients_come_first_and_stand_out_of_the_median():
    rng = np.random.default_rng(1)
    planted = np.arange(300) < 30
    step, code, value = signals_of(rng, 300, 10, np.where(planted, 3.0, 1.0), np.full(300, 0.8))
    index = SampleIndex(300)
    zero = self_influence(index, step, code=code, value=value)
    median = self_influence(index, step, code=code, value=value, reference="median")
    assert detection(zero["mu"], planted).auroc > 0.99
    assert (zero["q_value"] < 0.05).mean() > 0.95
    flagged = (median["q_value"] < 0.05).to_numpy()
    assert flagged[planted].mean() > 0.9
    assert flagged[~planted].mean() < 0.1
    own = self_influence(index, step, code=code, value=value, scale="own")
    np.testing.assert_allclose(own["se"], 1)
    np.testing.assert_allclose(own["p_value"], zero["p_value"])


def test_one_epoch_ranks_without_errors_and_unseen_samples_are_null():
    rng = np.random.default_rng(2)
    step, code, value = signals_of(rng, 50, 1, rng.random(50), np.zeros(50))
    frame = self_influence(SampleIndex(52), step, code=code, value=value)
    assert frame["mu"][:50].std(ddof=0) == pytest.approx(1)
    assert frame["se"].null_count() == 52
    assert frame["mu"].null_count() == 2
    assert "one visit" in metadata(frame)["unit"]


def test_bad_self_influence():
    index = SampleIndex(2)
    with pytest.raises(InputError, match="do not vary"):
        self_influence(index, [0, 1, 2, 3], code=[0, 1, 0, 1], value=[1.0, 1, 1, 1])
    with pytest.raises(InputError, match="reference is 'mean'"):
        self_influence(index, [0, 1], code=[0, 1], value=[1.0, 2.0], reference="mean")  # pyright: ignore
    with pytest.raises(InputError, match="scale is"):
        self_influence(index, [0, 1], code=[0, 1], value=[1.0, 2.0], scale="both")  # pyright: ignore
