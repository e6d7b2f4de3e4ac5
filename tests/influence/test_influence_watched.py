"""The two-stage test of watched subsets, and of single samples, against a direct computation."""

import numpy as np
import polars as pl
import pytest

from finfluence.errors import InputError
from finfluence.influence import (
    Reporting,
    SampleIndex,
    metadata,
    two_stage,
    two_stage_samples,
    watched_frame,
    watched_observations,
)
from finfluence.tradeoff import compare

T = 60
REPORTING = Reporting()


def watch(*, auxiliary: bool = False) -> pl.DataFrame:
    """Observations of two subsets; subset "a" lowers query "q" by .5 a step; step 7 of "a" has nothing without it."""
    generator = np.random.default_rng(3)
    frames = []
    for subset, effect in (("a", 0.5), ("b", 0.0)):
        common = generator.standard_normal(T)
        arms = {"with": common - effect, "without": common + 0.1 * generator.standard_normal(T)}
        if auxiliary:
            arms["auxiliary"] = 0.9 * common
        if subset == "a":
            arms["without"][7] = np.nan
        for arm, values in arms.items():
            frames.append(
                pl.DataFrame({"step": np.arange(T), "q": values.astype(np.float32), "other": np.zeros(T, np.float32)})
                .with_columns(subset=pl.lit(subset), arm=pl.lit(arm))
                .select("step", "subset", "arm", "q", "other")
            )
    return pl.concat(frames).sample(fraction=1.0, shuffle=True, seed=1)


def test_observations_come_in_the_order_of_the_steps_without_those_of_the_subset_alone() -> None:
    frame = watch(auxiliary=True)
    o_with, o_without, auxiliary = watched_observations(frame, "a", "q")
    assert auxiliary is not None
    assert len(o_with) == len(o_without) == len(auxiliary) == T - 1
    rows = frame.filter(pl.col("subset") == "a", pl.col("step") != 7).sort("step")
    for values, arm in ((o_with, "with"), (o_without, "without"), (auxiliary, "auxiliary")):
        np.testing.assert_array_equal(values, rows.filter(pl.col("arm") == arm)["q"].to_numpy().astype(np.float64))
    assert watched_observations(watch(), "b", "q")[2] is None
    with pytest.raises(InputError, match=r"subset 'c' was not watched \(watched: a, b\); name it in train\(watch="):
        watched_observations(frame, "c", "q")


@pytest.mark.parametrize("rule", ["median", "max", "gaussian", "clopper-pearson"])
def test_a_frame_holds_the_two_stage_estimates(rule: str) -> None:
    frame = watched_frame(watch(), ["b", "a"], query="q", rule=rule, reporting=REPORTING, sizes={"a": 3, "b": 4})  # pyright: ignore[reportArgumentType]
    assert frame.columns == ["subset", "size", "mu", "se", "ci_low", "ci_high", "p_value", "q_value"]
    assert frame["size"].to_list() == [4, 3]
    o_with, o_without, _ = watched_observations(watch(), "a", "q")
    step = compare(o_with, o_without, estimator=rule)  # pyright: ignore[reportArgumentType]
    assert frame["mu"][1] == pytest.approx(step.mu * np.sqrt(T - 1))
    assert metadata(frame)["estimator"] == rule
    assert "mu > 0" in metadata(frame)["sign"]


def test_differencing_with_the_auxiliary_model_sharpens_the_test() -> None:
    plain = watched_frame(watch(), ["a"], query="q", rule="gaussian", reporting=REPORTING, sizes={"a": 3})
    sharper = watched_frame(
        watch(auxiliary=True), ["a"], query="q", rule="gaussian", reporting=REPORTING, sizes={"a": 3}
    )
    assert sharper["mu"].item() > 2 * plain["mu"].item() > 0
    with pytest.raises(InputError, match="subsets is empty"):
        watched_frame(watch(), [], query="q", rule="gaussian", reporting=REPORTING, sizes={})


def test_single_samples_against_a_loop_over_their_steps() -> None:
    # Seed 0: 8 samples, each in 3 of the 6 places of 12 steps; sample 8 is never drawn.
    generator = np.random.default_rng(0)
    steps = np.repeat(np.arange(12), 4)
    codes = np.concatenate([generator.permutation(8)[:4] for _ in range(12)])
    values = generator.standard_normal(48)
    index = SampleIndex([f"s{i}" for i in range(9)])
    frame = two_stage_samples(index, step=steps, code=codes, value=values, rule="gaussian")
    assert frame["sample"].to_list() == list(index.ids)
    for code in range(8):
        mine = np.flatnonzero(codes == code)
        batch = np.array([values[steps == steps[k]].sum() for k in mine])
        rest = (batch - values[mine]) * 4 / 3
        assert frame["mu"][code] == pytest.approx(two_stage(batch, rest, rule="gaussian").mu)
    assert frame.row(8, named=True) == {"sample": "s8"} | dict.fromkeys(frame.columns[1:])
    with pytest.raises(InputError, match="no sample was in enough batches"):
        two_stage_samples(index, step=steps[:4], code=codes[:4], value=values[:4], rule="gaussian")
