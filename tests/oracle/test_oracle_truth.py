"""What is computed from trainings: influence with its error, ceilings, and the cases that have no answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from finfluence.errors import InputError, OracleError
from finfluence.influence.metadata import metadata
from finfluence.runs.oracle import Truth, open_truth
from finfluence.runs.oracle.problem import Job, Outcome
from finfluence.runs.oracle.store import TruthStore
from finfluence.tradeoff import SIGN_CONVENTION, compare, gaussianity


def _truth(
    directory: Any,
    values: dict[str, np.ndarray],
    failed: dict[str, int] | None = None,
    *,
    orders: str | None = None,
    first: dict[str, int] | None = None,
) -> Truth:
    """A truth of made-up measurements: (runs, queries) by arm; queries a, b, …; an arm's runs count from `first` on."""
    queries = [chr(ord("a") + k) for k in range(next(iter(values.values())).shape[1])]
    store = TruthStore(directory)
    store.begin(
        {"queries": dict.fromkeys(queries, ""), "measured_epochs": [2], "budget": "steps", "initialisation": "fixed"}
        | ({} if orders is None else {"orders": orders}),
        {name: {"arm": name, "ids": [k, k + 7]} for k, name in enumerate(values) if name != "base"},
    )
    outcomes = [
        Outcome(Job(arm, run, run), row[None], None, 0.1)
        for arm, rows in values.items()
        for run, row in enumerate(rows, (first or {}).get(arm, 0))
    ]
    outcomes += [
        Outcome(Job(arm, 100 + k, k), None, "ValueError: no", 0.1)
        for arm, n in (failed or {}).items()
        for k in range(n)
    ]
    store.append(outcomes, queries=queries, epochs=[2])
    return open_truth(directory)


@pytest.fixture
def normal() -> dict[str, np.ndarray]:
    """Gaussian measurements, seed 0: mu = 0 without s0, 0.5 without s1, ... 2.5 without s5, in both queries."""
    generator = np.random.default_rng(0)
    arms = {"base": 3 + 0.1 * generator.standard_normal((60, 2))}
    return arms | {f"s{k}": 3 + 0.1 * (k / 2 + generator.standard_normal((50, 2))) for k in range(6)}


@pytest.mark.parametrize("estimator", ["gaussian", "rank"])
def test_influence_equals_the_estimator(tmp_path: Any, normal: dict[str, np.ndarray], estimator: Any) -> None:
    frame = _truth(tmp_path, normal).influence("b", estimator=estimator, level=0.9)
    assert frame["subset"].to_list() == [f"s{k}" for k in range(6)]
    for row in frame.iter_rows(named=True):
        p, q = normal["base"][:, 1], normal[row["subset"]][:, 1]
        expected = compare(p, q, estimator=estimator)
        assert (row["mu"], row["se"], row["p_value"]) == (expected.mu, expected.se, expected.p_value)
        assert (row["ci_low"], row["ci_high"]) == expected.interval(0.9)
        assert (row["size"], row["runs_with"], row["runs_without"], row["missing"]) == (2, 60, 50, 0)
        assert row["q_value"] >= row["p_value"]
        looks = gaussianity(p, q)
        assert (row["normality_p"], row["variance_ratio_p"]) == (looks.normality_p, looks.variance_p)
    assert metadata(frame)["sign"] == SIGN_CONVENTION
    # Removing s5 raises the measurement by 2.5 sd: it supports the behaviour. Wrong sign: probability below 1e-20.
    assert frame["mu"][5] > 1


def test_matrix_agrees_with_influence(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    truth = _truth(tmp_path, normal)
    mu, se = truth.matrix(["b", "a"])
    for row, query in enumerate(["b", "a"]):
        frame = truth.influence(query)
        np.testing.assert_allclose(mu[row], frame["mu"].to_numpy(), rtol=1e-12)
        np.testing.assert_allclose(se[row], frame["se"].to_numpy(), rtol=1e-12)


def test_halves_share_no_training(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    """Each half equals the estimate of its own runs, base arm included, computed naively."""
    first, second = _truth(tmp_path, normal).split_halves(["a"])
    for k in range(6):
        for half, found in enumerate((first, second)):
            expected = compare(normal["base"][half::2, 0], normal[f"s{k}"][half::2, 0]).mu
            assert found[0, k] == pytest.approx(expected)
    assert not np.allclose(first, second)


def test_pairs_are_matched_by_run(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    """Runs that one arm has not finished are left out of both, and the error is that of pairs."""
    arms = {"base": normal["base"], "s0": normal["base"][5:35] + 0.02 * (1 + normal["s0"][:30])}
    truth = _truth(tmp_path / "many", arms, orders="paired", first={"s0": 5})
    p, q = truth.losses("a", "s0")
    np.testing.assert_array_equal(p, normal["base"][5:35, 0])
    np.testing.assert_array_equal(q, arms["s0"][:, 0])
    expected = compare(p, q, paired=True)
    row = truth.influence("a").row(0, named=True)
    assert (row["mu"], row["se"], row["p_value"]) == (expected.mu, expected.se, expected.p_value)
    assert (row["runs_with"], row["runs_without"], row["missing"]) == (30, 30, 0)
    assert metadata(truth.influence("a"))["orders"] == "paired"
    mu, se = truth.matrix(["a"])
    assert (mu[0, 0], se[0, 0]) == pytest.approx((expected.mu, expected.se))
    halves = truth.split_halves(["a"])
    assert halves[1][0, 0] == pytest.approx(compare(p[1::2], q[1::2], paired=True).mu)
    assert truth.influence("a", estimator="rank")["mu"][0] == compare(p, q, "rank").mu
    few = _truth(tmp_path / "few", {"base": arms["base"][:6], "s0": arms["s0"][:6]}, orders="paired", first={"s0": 3})
    with pytest.raises(OracleError, match=r"3 finished runs with all samples and 3 without 's0'.*1 more in all"):
        few.influence("a")


def test_losses_and_curve(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    truth = _truth(tmp_path, normal)
    with_s1, without_s1 = truth.losses("a", "s1")
    np.testing.assert_array_equal(with_s1, normal["base"][:, 0])
    np.testing.assert_array_equal(without_s1, normal["s1"][:, 0])
    curve = truth.tradeoff_curve("a", "s5")
    assert float(curve(0.05)) < 0.5
    assert truth.subsets["s1"].tolist() == [2, 9]


def test_too_few_runs_are_counted(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    truth = _truth(tmp_path, normal | {"s1": normal["s1"][:1], "s2": normal["s2"][:3]}, failed={"s1": 2})
    frame = truth.influence("a")
    assert frame["missing"].to_list() == [0, 3, 1, 0, 0, 0]
    assert frame["mu"].is_null().to_list() == [False, True, True, False, False, False]
    assert frame["q_value"].is_null().to_list() == [False, True, True, False, False, False]
    assert truth.failed().select("subset", "error").rows() == [("s1", "ValueError: no")] * 2
    assert np.isnan(truth.matrix(["a"])[0][0]).tolist() == [False, True, True, False, False, False]
    with pytest.raises(OracleError, match="3 without subset 's2'"):
        truth.tradeoff_curve("a", "s2")


def test_too_few_runs_everywhere_is_an_error(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    truth = _truth(tmp_path, {"base": normal["base"][:2], "s1": normal["s1"][:1]}, failed={"s1": 3})
    with pytest.raises(
        OracleError, match=r"2 finished runs.*5 more in all \(3 failed, the last with: ValueError: no\)"
    ):
        truth.influence("a")


def test_deterministic_training_has_no_mu(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    """Values that differ by float32 rounding alone would otherwise give mu in the thousands."""
    arms = {}
    for k, (name, rows) in enumerate(normal.items()):
        constant = np.full(len(rows), 3.0 + k) * (1 + 1e-7 * (np.arange(len(rows)) % 2))
        arms[name] = np.stack([constant, rows[:, 1]], axis=1)
    truth = _truth(tmp_path, arms)
    for call in (lambda: truth.influence("a"), lambda: truth.matrix(), lambda: truth.split_halves()):
        with pytest.raises(OracleError, match="deterministic training: query 'a'"):
            call()
    assert truth.influence("b")["mu"].null_count() == 0


def test_bad_input(tmp_path: Any, normal: dict[str, np.ndarray]) -> None:
    truth = _truth(tmp_path / "truth", normal)
    with pytest.raises(InputError, match="unknown query 'z'; this truth has a, b"):
        truth.influence("z")
    with pytest.raises(InputError, match="unknown subset 's9'"):
        truth.losses("a", "s9")
    with pytest.raises(InputError, match="estimator 'max'"):
        truth.influence("a", estimator="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="epoch 1 was not measured"):
        truth.matrix(epoch=1)
    with pytest.raises(OracleError, match=r"no truth\.json"):
        open_truth(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OracleError, match=r"notes\.txt"):
        open_truth(tmp_path / "other")


def test_a_later_success_replaces_a_failure_and_parts_merge(tmp_path: Any) -> None:
    store = TruthStore(tmp_path)
    job, values = Job("base", 0, 5), np.array([[1.5]])
    finished, failed = Outcome(job, values, None, 0.1), Outcome(job, None, "boom", 0.1)
    for outcome in [failed, finished, failed] * 12:
        store.append([outcome], queries=["a"], epochs=[1])
    assert store.trainings(["a"]).select("status", "a").rows() == [("finished", 1.5)]
    store.compact(["a"])
    assert len(list((tmp_path / "trainings").iterdir())) == 1
    assert store.trainings(["a"]).select("status", "a").rows() == [("finished", 1.5)]
    assert pl.read_parquet(tmp_path / "trainings").height == 1
