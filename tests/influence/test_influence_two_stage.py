"""f-INE's two-stage test and the observations that are rebuilt from recorded signals."""

import numpy as np
import pytest
from influence_simulation import shuffle_run, signal_matrix

from finfluence.errors import InputError
from finfluence.influence import Reporting, SampleIndex, metadata, observations, two_stage, two_stage_subsets
from finfluence.tradeoff import compare


def run(seed=0, n=60, batch=6, epochs=20):
    rng = np.random.default_rng(seed)
    return shuffle_run(rng, signal_matrix(rng, n, epochs * n // batch), batch, epochs)


def test_observations_equal_a_loop():
    step, code, value = run()
    subset = [1, 5, 30, 31]
    expected = []
    for t in np.unique(step):
        batch, x = code[step == t], value[step == t]
        kept = ~np.isin(batch, subset)
        if not kept.all() and kept.any():
            expected.append((x.sum(), x[kept].sum() * len(x) / kept.sum()))
    order = np.random.default_rng(1).permutation(len(step))
    found = observations(step[order], code[order], value=value[order], subset=subset)
    np.testing.assert_allclose(np.array(found).T, expected)


def test_steps_of_the_subset_alone_are_left_out():
    o_with, o_without = observations([0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 2, 3], value=[1.0, 2, 3, 4, 5, 6], subset=[0, 1])
    np.testing.assert_allclose(o_with, [7.0])
    np.testing.assert_allclose(o_without, [8.0])
    with pytest.raises(InputError, match="no step's batch"):
        observations([0, 0], [0, 1], value=[1.0, 2.0], subset=[0, 1])
    with pytest.raises(InputError, match="no step's batch"):
        observations([0, 0], [0, 1], value=[1.0, 2.0], subset=[9])


@pytest.mark.parametrize("rule", ["median", "max", "gaussian", "clopper-pearson"])
def test_two_stage_is_compare_composed_over_steps(rule):
    rng = np.random.default_rng(2)
    o_with, o_without = rng.normal(size=100), rng.normal(size=100) + 1.0
    found = two_stage(o_with, o_without, rule=rule)
    step = compare(o_with, o_without, estimator=rule)
    assert found.mu == pytest.approx(10 * step.mu)
    assert found.mu > 0
    assert found.se == pytest.approx(10 * step.se)
    assert found.interval(0.9) == pytest.approx(tuple(10 * end for end in step.interval(0.9)))
    assert found.p_value() == step.p_value
    assert found.p_value("supporting") < 0.01 < found.p_value("harmful")
    assert two_stage(o_with, o_without, rule=rule, steps=400).mu == pytest.approx(20 * step.mu)


def test_the_auxiliary_model_removes_what_the_steps_share():
    rng = np.random.default_rng(3)
    drift = 20 * np.sin(np.linspace(0, 6, 200))
    o_with, o_without = drift + rng.normal(size=200), drift + rng.normal(size=200) + 1.0
    plain = two_stage(o_with, o_without, rule="gaussian")
    difference = two_stage(o_with, o_without, auxiliary=drift, rule="gaussian")
    assert difference.mu == pytest.approx(200**0.5, rel=0.25)
    assert plain.mu < 0.2 * difference.mu


def test_the_largest_threshold_exaggerates_where_nothing_is():
    # 40 pairs without influence, seed 4: the mean magnitude of "max" a step is near 0.56, of the median near 0.
    rng = np.random.default_rng(4)
    pairs = [(rng.normal(size=200), rng.normal(size=200)) for _ in range(40)]
    largest = [abs(two_stage(*pair, rule="max", steps=1).mu) for pair in pairs]
    middle = [two_stage(*pair, steps=1).mu for pair in pairs]
    assert 0.45 < np.mean(largest) < 0.7
    assert abs(np.mean(middle)) < 0.1


def test_frame_of_recorded_subsets():
    step, code, value = run(5)
    value = value - 0.5 * (code < 6)
    frame = two_stage_subsets(
        SampleIndex([f"s{i}" for i in range(60)]),
        {"low": [f"s{i}" for i in range(6)], "rest": [f"s{i}" for i in range(20, 26)]},
        step=step,
        code=code,
        value=value,
        reporting=Reporting(alternative="supporting"),
        meta=[("query", "q")],
    )
    assert frame.columns == ["subset", "size", "mu", "se", "ci_low", "ci_high", "p_value", "q_value"]
    assert frame["mu"][0] > 5 > abs(frame["mu"][1])
    assert frame["q_value"][0] < 0.01 < frame["q_value"][1]
    assert metadata(frame)["estimator"] == "median"
    assert metadata(frame)["query"] == "q"


def test_bad_two_stage_input():
    with pytest.raises(InputError, match="shapes \\(3,\\) and \\(2,\\)"):
        two_stage([1.0, 2, 3], [1.0, 2])
    with pytest.raises(InputError, match="auxiliary has shape"):
        two_stage([1.0, 2, 3], [1.0, 2, 4], auxiliary=[1.0])
    with pytest.raises(InputError, match="rule is 'mean'"):
        two_stage([1.0, 2, 3], [1.0, 2, 4], rule="mean")  # pyright: ignore
    with pytest.raises(InputError, match="steps is 0"):
        two_stage([1.0, 2, 3], [1.0, 2, 4], steps=0)
