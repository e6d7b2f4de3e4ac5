"""What the writer accepts, refuses and puts on disk."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signals_helpers import QUERIES, assert_holds, expected_rows, record, rows_of, start, step_row

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.signals import SignalStore, SignalWriter

SAMPLES = pl.DataFrame({"sample": [3, 1, 2], "label": ["a", "b", "a"]})


@pytest.mark.parametrize("id_dtype", ["int64", "str"])
def test_rows_come_back_as_they_were_appended(tmp_path: Path, id_dtype: str) -> None:
    with start(tmp_path / "run", id_dtype=id_dtype) as writer:
        for step in range(17):
            record(writer, step)
            if step == 9:
                writer.flush()
    store = SignalStore.open(tmp_path / "run")
    assert_holds(store, range(17))
    assert store.status == "finished"
    assert store.n_steps == 17
    frame = store.panel().collect()
    sample = pl.Int64 if id_dtype == "int64" else pl.String
    assert frame.schema == {
        "step": pl.Int64,
        "epoch": pl.Int64,
        "position": pl.Int64,
        "sample": sample,
        "first": pl.Float32,
        "second": pl.Float32,
    }


OPERATIONS = st.lists(
    st.one_of(
        st.just("step"), st.just("step"), st.just("half"), st.just("flush"), st.just("reopen"), st.integers(0, 12)
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(operations=OPERATIONS, buffer_rows=st.sampled_from([1, 7, 1000]), id_dtype=st.sampled_from(["int64", "str"]))
def test_any_sequence_of_operations_shows_the_finished_steps(
    operations: list[Any], buffer_rows: int, id_dtype: str
) -> None:
    # "half": a step's signals without its row, then a new start, as after a kill in the middle of a step.
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        options = {"id_dtype": id_dtype, "exist": "resume", "buffer_rows": buffer_rows}
        writer, recorded, durable = start(directory, **options), 0, 0
        for operation in operations:
            if operation == "step":
                record(writer, recorded)
                recorded += 1
            elif operation == "half":
                ids, values = [7 if id_dtype == "int64" else "stranger"], np.zeros((1, 2))
                writer.append_signals(recorded, ids, values)
                writer.flush()
                writer = start(directory, **options)
            elif operation == "flush":
                writer.flush()
            elif operation == "reopen":
                writer = start(directory, **options)
            else:
                recorded = min(recorded, operation)
                writer.truncate_from(operation)
            if operation in ("half", "reopen"):
                durable = writer.last_step
                recorded = 0 if durable is None else durable + 1
            assert writer.last_step == (recorded - 1 if recorded else None)
            shown = SignalStore.open(directory, partial=True)
            assert shown.n_steps <= recorded
            assert_holds(shown, range(shown.n_steps))
        writer.close()
        assert_holds(SignalStore.open(directory), range(recorded))


def test_a_flush_cuts_between_steps(tmp_path: Path) -> None:
    # The limit is reached in the middle of a step's three calls; each part must still hold whole steps.
    writer = start(tmp_path / "run", buffer_rows=3)
    for step in range(12):
        record(writer, step)
    writer.close()
    seen: dict[int, str] = {}
    for part in sorted((tmp_path / "run/signals").iterdir()):
        for step in set(pq.read_table(part)["step"].to_pylist()):
            assert seen.setdefault(step, part.name) == part.name
    assert len(set(seen.values())) > 3


def test_signals_of_a_step_without_row_are_dropped_with_a_warning(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    record(writer, 0)
    writer.append_signals(1, [1, 2], np.zeros((2, 2)))
    with pytest.warns(FinfluenceWarning, match="2 signals of step 1 and later were dropped"):
        writer.close()
    assert_holds(SignalStore.open(tmp_path / "run"), range(1))


def test_an_exception_closes_as_failed_and_keeps_finished_steps(tmp_path: Path) -> None:
    def fail() -> None:
        with start(tmp_path / "run") as writer:
            record(writer, 0)
            writer.append_signals(1, [1], np.zeros((1, 2)))
            raise RuntimeError("training diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        fail()
    store = SignalStore.open(tmp_path / "run")
    assert store.status == "failed"
    assert_holds(store, range(1))


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    with start(tmp_path / "whole") as writer:
        for step in range(30):
            record(writer, step)
    writer = start(tmp_path / "resumed", buffer_rows=20)
    for step in range(23):
        record(writer, step)
    writer = start(tmp_path / "resumed", exist="resume")
    writer.truncate_from(10)
    assert writer.last_step == 9
    for step in range(10, 30):
        record(writer, step)
    writer.close()
    whole, resumed = SignalStore.open(tmp_path / "whole"), SignalStore.open(tmp_path / "resumed")
    for table in ("steps", "signals", "live", "panel"):
        assert rows_of(whole, table) == rows_of(resumed, table)


def test_a_part_written_again_replaces_itself(tmp_path: Path) -> None:
    with start(tmp_path / "run") as writer:
        for step in range(6):
            record(writer, step, live=False)
    writer = SignalWriter.resume(tmp_path / "run")
    for steps in ((3, 4, 5), (0, 1, 2), (3, 4, 5)):
        rows = expected_rows("live", steps)
        frame = pl.DataFrame(rows, schema=["step", "sample", *QUERIES], orient="row")
        writer.replace_part("live", f"segment-{steps[0]}", frame)
    assert writer.parts("live") == ["segment-0", "segment-3"]
    writer.close()
    assert_holds(SignalStore.open(tmp_path / "run"), range(6))
    writer = SignalWriter.resume(tmp_path / "run")
    writer.clear("live")
    writer.close()
    assert rows_of(SignalStore.open(tmp_path / "run"), "live") == []


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    frame = pl.DataFrame({"step": [0], "sample": [1], "first": [1.0], "second": [2.0]})
    for name in ("00000003", "a/b", "", "../x"):
        with pytest.raises(InputError, match="part name"):
            writer.replace_part("signals", name, frame)
    with pytest.raises(InputError, match="pass step, sample, first, second"):
        writer.replace_part("signals", "a", frame.drop("second"))
    with pytest.raises(InputError, match="1 empty cells"):
        writer.replace_part("signals", "a", frame.with_columns(first=pl.lit(None, pl.Float32)))
    with pytest.raises(InputError, match="do not fit"):
        writer.replace_part("signals", "a", frame.with_columns(sample=pl.lit("doc")))
    with pytest.raises(InputError, match="table 'steps'"):
        writer.replace_part("steps", "a", frame)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "queries is empty"),
        ("loss", r"pass \['loss'\]"),
        (["a", "a"], "'a' is given twice"),
        (["a", " "], "' ' is not a non-empty string"),
        (["a", 3], "3 is not a non-empty string"),
        (["step"], "'step' is a reserved column"),
        (["position"], "'position' is a reserved column"),
    ],
)
def test_query_names_that_cannot_be_columns(tmp_path: Path, queries: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(tmp_path / "run", queries=queries)
    assert not (tmp_path / "run").exists()


def test_an_existing_directory_is_never_written_over(tmp_path: Path) -> None:
    start(tmp_path / "run").close()
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(StoreError, match=r"run already holds a run; choose another directory, or resume it"):
        start(tmp_path / "run")
    assert (tmp_path / "run/run.json").read_bytes() == before
    with pytest.raises(StoreError, match=r"was started with queries \['first', 'second'\], not \['other'\]"):
        start(tmp_path / "run", queries=["other"], exist="resume")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    for exist in ("error", "resume"):
        with pytest.raises(StoreError, match=r"photos exists and is not a run directory \(it holds 'cat.jpg'"):
            start(tmp_path / "photos", exist=exist)
        with pytest.raises(StoreError, match="is a file, not a run directory"):
            start(tmp_path / "file", exist=exist)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty").close()


def test_batches_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    values = np.zeros((2, 2))
    for samples, wrong, message in (
        ([1, 2, 3], values, "3 sample identifiers for 2 rows"),
        ([1, 2], np.zeros((2, 3)), r"shape \(2, 3\); pass \(b, n_queries\) = \(2, 2\)"),
        ([1, 2], np.zeros(2), r"shape \(2,\)"),
        ([1.5, 2.0], values, "1.5 is not an integer"),
        (["a", "b"], values, "'a' is not an integer"),
        ([[1, 2]], values, r"shape \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            writer.append_signals(0, samples, wrong)
    with pytest.raises(InputError, match="only 'panel' has both"):
        writer.append_table("live", 0, samples=[1], values=np.zeros((1, 2)), epoch=0, position=0)
    with pytest.raises(InputError, match="table 'foo' is not one of"):
        writer.append_table("foo", 0, samples=[1], values=np.zeros((1, 2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"step is 1\.5"):
        writer.append_signals(1.5, [1, 2], values)  # pyright: ignore[reportArgumentType]
    named = start(tmp_path / "named", id_dtype="str")
    with pytest.raises(InputError, match="7 is not a string"):
        named.append_signals(0, ["a", 7], values)
    record(writer, 0)
    writer.close()
    assert_holds(SignalStore.open(tmp_path / "run"), range(1))


def test_step_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    row = step_row(4)
    with pytest.raises(InputError, match="lacks the column 'loss'"):
        writer.append_steps(**{name: value for name, value in row.items() if name != "loss"})
    with pytest.raises(InputError, match="has the column 'los'"):
        writer.append_steps(**row, los=1.0)
    with pytest.raises(InputError, match="'loss' of a step is 'high'"):
        writer.append_steps(**(row | {"loss": "high"}))
    writer.append_steps(**row)
    for step in (4, 3):
        with pytest.raises(InputError, match=rf"step {step} comes after step 4.*truncate_from\({step}\)"):
            writer.append_steps(**step_row(step))
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.append_steps(**step_row(5))


def test_non_finite_values_are_stored_and_counted(tmp_path: Path) -> None:
    values = np.array([[math.nan, 1.0], [math.inf, 1e300], [-math.inf, 0.0]])
    with start(tmp_path / "run") as writer:
        writer.append_signals(0, [1, 2, 3], values)
        writer.append_steps(**step_row(0))
        assert writer.nonfinite == {"signals": 4, "live": 0, "panel": 0, "self": 0}
    shown = SignalStore.open(tmp_path / "run").signals().collect()
    np.testing.assert_array_equal(shown["first"].to_numpy(), values[:, 0].astype(np.float32))
    np.testing.assert_array_equal(shown["second"].to_numpy(), np.float32([1.0, np.inf, 0.0]))


def test_the_sample_table_has_unique_ids(tmp_path: Path) -> None:
    writer = start(tmp_path / "run", samples=SAMPLES)
    assert pq.read_table(tmp_path / "run/samples.parquet").to_pydict() == SAMPLES.to_dict(as_series=False)
    writer.write_samples(SAMPLES.with_columns(source=pl.lit("web")))
    with pytest.raises(InputError, match="names other samples"):
        writer.write_samples(SAMPLES.head(2))
    for frame, message in (
        (pl.DataFrame({"sample": [1, 2, 1]}), "identifier 1 stands more than once"),
        (pl.DataFrame({"id": [1]}), "no column 'sample'"),
        (pl.DataFrame({"sample": ["a"]}), "are String, the run's are int64"),
        (pl.DataFrame({"sample": [1, None]}), "1 rows without identifier"),
    ):
        with pytest.raises(InputError, match=message):
            start(tmp_path / "other", samples=frame)
        assert not (tmp_path / "other").exists()
    assert writer.queries == QUERIES


def test_the_manifest_is_rewritten_and_keeps_its_own_fields(tmp_path: Path) -> None:
    writer = start(tmp_path / "run", manifest={"seed": np.int64(3), "path": tmp_path})
    writer.update_manifest(epochs=5, seed=4)
    on_disk = json.loads((tmp_path / "run/run.json").read_text())
    assert on_disk == writer.manifest | {"path": str(tmp_path)}
    assert (on_disk["seed"], on_disk["epochs"], on_disk["status"]) == (4, 5, "running")
    for fields, message in (
        ({"status": "finished"}, "'status' is kept by the store"),
        ({"loss": math.nan}, "'loss' = nan cannot be written"),
        ({"model": object()}, "'model' = .* cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            writer.update_manifest(**fields)
    assert json.loads((tmp_path / "run/run.json").read_text()) == on_disk
