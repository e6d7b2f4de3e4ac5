"""The tables: exact columns, p- and q-values against scipy, metadata, groups equal to subsets."""

import gc

import numpy as np
import polars as pl
import pytest
from scipy import stats

from finfluence.errors import InputError
from finfluence.influence import (
    InfluenceTable,
    Noise,
    Reporting,
    SampleIndex,
    SampleTotals,
    attach,
    metadata,
    q_values,
    report,
)
from finfluence.tradeoff import SIGN_CONVENTION, GaussianInfluence

COLUMNS = ["mu", "se", "ci_low", "ci_high", "p_value", "q_value"]


def table(**options):
    rng = np.random.default_rng(0)
    n = 30
    totals = SampleTotals(np.ones(n), rng.normal(size=n), rng.normal(size=n), batch=8.0)
    index = SampleIndex([f"s{i}" for i in range(n)])
    return InfluenceTable(index, totals, Noise(9.0, None, "shuffled", "note"), **options)


def test_columns_and_order_are_the_contract():
    found = table()
    samples = found.samples()
    assert samples.columns == ["sample", *COLUMNS]
    assert samples["sample"].to_list() == [f"s{i}" for i in range(30)]
    assert found.subsets({"a": ["s1"]}).columns == ["subset", "size", *COLUMNS]
    assert found.groups(["x", "y"] * 15).columns == ["group", "size", *COLUMNS]
    assert samples.schema["mu"] == pl.Float64
    assert found.subsets([["s1"], ["s2", "s3"]])["size"].to_list() == [1, 2]


def test_the_sign_a_sample_that_lowers_the_loss_supports():
    n = 10
    centred = np.r_[-2.0, np.full(n - 1, 2 / (n - 1))]
    totals = SampleTotals(np.ones(n), centred, centred, batch=5.0)
    mu = InfluenceTable(SampleIndex(n), totals, Noise(1.0, None, "x", "")).samples()["mu"]
    assert mu[0] == 2.0
    assert (mu[1:] < 0).all()


@pytest.mark.parametrize("alternative", ["two-sided", "harmful", "supporting"])
@pytest.mark.parametrize("correction", ["bh", "by"])
def test_report_equals_scipy_and_gaussian_influence(alternative, correction):
    rng = np.random.default_rng(1)
    mu, se = rng.normal(size=50) * 2, rng.random(50) + 0.1
    frame = pl.DataFrame(report(mu, se, reporting=Reporting(0.9, alternative, correction)))
    each = [GaussianInfluence(m, s) for m, s in zip(mu, se, strict=True)]
    np.testing.assert_allclose(frame["p_value"], [g.p(alternative) for g in each])
    np.testing.assert_allclose(frame.select("ci_low", "ci_high").to_numpy(), [g.interval(0.9) for g in each])
    np.testing.assert_allclose(
        frame["q_value"], stats.false_discovery_control(frame["p_value"].to_numpy(), method=correction)
    )
    low, high = stats.t.interval(0.9, 4, mu, se)
    small = report(mu, se, reporting=Reporting(0.9), dof=4)
    np.testing.assert_allclose(small["ci_low"], low)
    np.testing.assert_allclose(small["ci_high"], high)
    np.testing.assert_allclose(small["p_value"], 2 * stats.t.sf(np.abs(mu / se), 4))


def test_missing_estimates_are_null_and_no_test():
    found = report([1.0, np.nan, 2.0, 3.0], [0.5, np.nan, 0.0, np.nan])
    assert [series.null_count() for series in found.values()] == [1, 2, 2, 2, 3, 3]
    np.testing.assert_allclose(q_values([0.01, np.nan, 0.04])[[0, 2]], [0.02, 0.04])
    assert found["q_value"][0] == found["p_value"][0]


def test_groups_equal_the_same_subsets():
    found = table(replacement="exact")
    labels = [None if i < 3 else "even" if i % 2 == 0 else "odd" for i in range(30)]
    groups = found.groups(labels)
    same = found.subsets({name: [f"s{i}" for i in range(30) if labels[i] == name] for name in ("even", "odd")})
    assert groups["group"].to_list() == ["even", "odd"]
    assert groups["size"].to_list() == same["size"].to_list()
    np.testing.assert_allclose(groups.select(COLUMNS).to_numpy(), same.select(COLUMNS).to_numpy())


def test_groups_keep_the_type_of_their_labels():
    assert table().groups(np.arange(30) % 3)["group"].dtype == pl.Int64
    assert table().groups(pl.Series([True, False] * 15))["group"].to_list() == [False, True]


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"] * 29, "29 group labels for 30"), (["a"] * 30, "'a' is the whole"), ([None] * 30, "null")],
)
def test_bad_groups(labels, message):
    with pytest.raises(InputError, match=message):
        table().groups(labels)


def test_tracin_is_the_plain_sum_without_error():
    found = table(estimator="tracin")
    frame = found.samples()
    np.testing.assert_allclose(frame["mu"], -found.totals.total)
    assert all(frame[name].null_count() == 30 for name in COLUMNS[1:])
    two = found.subsets([["s0", "s4"]])
    assert two["mu"][0] == pytest.approx(-found.totals.total[[0, 4]].sum())
    assert metadata(two)["unit"] == "units of the measurement"


def test_frames_say_what_they_are():
    found = table(meta=(("query", "validation"),), replacement="exact")
    frame = found.with_reporting(level=0.9, alternative="harmful").samples()
    meta = frame.finfluence.meta  # pyright: ignore
    assert meta["sign"] == SIGN_CONVENTION == frame.finfluence.sign  # pyright: ignore
    expected = {"query": "validation", "level": 0.9, "alternative": "harmful", "replacement": "exact", "sigma": 3.0}
    assert expected.items() <= meta.items()
    assert meta["condition"] == "conditional on the initialisation"
    assert metadata(frame.head(2)) == {"sign": SIGN_CONVENTION}
    assert metadata(attach(frame.head(2), **meta)) == meta


def test_metadata_is_forgotten_with_its_frame():
    from finfluence.influence.metadata import _STORE

    gc.collect()
    before = len(_STORE)
    frames = [attach(pl.DataFrame({"mu": [float(i)]}), run=i) for i in range(50)]
    assert len(_STORE) == before + 50
    assert [metadata(frame)["run"] for frame in frames] == list(range(50))
    del frames
    gc.collect()
    assert len(_STORE) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"estimator": "median"}, "'median'"), ({"budget": "x"}, "'x'"), ({"replacement": "y"}, "'y'")],
)
def test_bad_table_options(options, message):
    with pytest.raises(InputError, match=message):
        table(**options)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"alternative": "less"}, {"correction": "holm"}])
def test_bad_reporting(options):
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        Reporting(**options)


def test_table_needs_matching_parts():
    totals = SampleTotals(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(InputError, match="4 ids for 3"):
        InfluenceTable(SampleIndex(4), totals, Noise(1.0, None, "x", ""))
    with pytest.raises(InputError, match="needs the noise"):
        InfluenceTable(SampleIndex(3), totals)
