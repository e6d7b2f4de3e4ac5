"""The tables of watched subsets and of self-influence keep the store's promises."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from signals_helpers import name_of, record, start, step_row

from finfluence.errors import FinfluenceWarning, InputError
from finfluence.signals import SELF, SignalStore, SignalWriter, arrays, per_sample

ARMS = ("with", "without", "auxiliary")


def observed(step: int, subset: str, arm: str) -> np.ndarray:
    return np.random.default_rng([step, len(subset), ARMS.index(arm)]).standard_normal(2).astype(np.float32)


def watch(writer: SignalWriter, step: int) -> None:
    """Record a step, and behind its row what was observed of two subsets and the samples' own signals."""
    record(writer, step)
    for subset in ("a", "long name"):
        for arm in ARMS:
            writer.append_watch(step, subset, arm, observed(step, subset, arm))
    ids = [name_of(i, writer.id_dtype) for i in range(3)]
    writer.append_table("self", step, samples=ids, values=np.array([step, 1.0, -1.0]))


def expected(steps: range) -> list[tuple[Any, ...]]:
    return [
        (step, subset, arm, *map(float, observed(step, subset, arm)))
        for step in steps
        for subset in ("a", "long name")
        for arm in ARMS
    ]


def rows(store: SignalStore) -> list[tuple[Any, ...]]:
    return store.watch().collect().rows()


@pytest.mark.parametrize("id_dtype", ["int64", "str"])
def test_what_was_watched_reads_back_after_a_truncation_and_a_resumption(tmp_path: Path, id_dtype: str) -> None:
    with start(tmp_path / "run", id_dtype=id_dtype) as writer:
        for step in range(9):
            watch(writer, step)
            if step % 4 == 3:
                writer.flush()
    store = SignalStore.open(tmp_path / "run")
    assert store.watch().collect().columns == ["step", "subset", "arm", "first", "second"]
    assert rows(store) == expected(range(9))
    assert store.has("watch")
    with SignalWriter.resume(tmp_path / "run") as writer:
        writer.truncate_from(6)
        watch(writer, 6)
    store = SignalStore.open(tmp_path / "run")
    assert rows(store) == expected(range(7))
    own = arrays(store, SELF, table="self")
    assert own.steps.tolist() == np.repeat(np.arange(7), 3).tolist()
    assert own.values.tolist() == [value for step in range(7) for value in (step, 1.0, -1.0)]
    totals = per_sample(store, SELF, table="self")
    assert totals["total"].to_list()[:3] != [0.0] * 3
    assert totals["total"].sum() == sum(range(7))


def test_rows_of_a_step_without_its_row_do_not_count(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    watch(writer, 0)
    writer.append_watch(1, "a", "with", [1.0, 2.0])
    writer.append_table("self", 1, samples=[1], values=[1.0])
    with pytest.warns(FinfluenceWarning, match="2 signals of step 1 and later were dropped"):
        writer.close()
    store = SignalStore.open(tmp_path / "run")
    assert rows(store) == expected(range(1))
    # a flush that was killed before its `steps` part leaves parts of the other tables alone
    for part in (tmp_path / "run/steps").iterdir():
        part.unlink()
    store = SignalStore.open(tmp_path / "run")
    assert rows(store) == []
    assert not arrays(store, SELF, table="self").values.size
    SignalWriter.resume(tmp_path / "run").close()
    assert not list((tmp_path / "run/watch").iterdir()) + list((tmp_path / "run/self").iterdir())


def test_nothing_to_observe_is_nan_and_no_signal(tmp_path: Path) -> None:
    with start(tmp_path / "run") as writer:
        writer.append_watch(0, "a", "without", [np.nan, np.nan])
        writer.append_steps(**step_row(0))
        assert set(writer.nonfinite.values()) == {0}
    assert np.isnan(SignalStore.open(tmp_path / "run").watch().collect()["first"].to_numpy()).all()


def test_misfits_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'self' is a reserved column"):
        start(tmp_path / "run", queries=("self",))
    with start(tmp_path / "run") as writer:
        with pytest.raises(InputError, match="arm is 'both'; use one of with, without, auxiliary"):
            writer.append_watch(0, "a", "both", [1.0, 2.0])
        with pytest.raises(InputError, match=r"values has shape \(1, 3\); pass"):
            writer.append_watch(0, "a", "with", [1.0, 2.0, 3.0])
        with pytest.raises(InputError, match=r"values has shape \(1, 2\); pass \(b, n_queries\) = \(1, 1\)"):
            writer.append_table("self", 0, samples=[1], values=[[1.0, 2.0]])
    store = SignalStore.open(tmp_path / "run")
    with pytest.raises(InputError, match=r"unknown query 'self'; .* has 'first', 'second'"):
        arrays(store, SELF)
    with pytest.raises(InputError, match=r"unknown query 'first'; .* has 'self'"):
        arrays(store, "first", table="self")
