"""What the reader shows, and what it refuses to read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from signals_helpers import N_SAMPLES, assert_holds, name_of, record, rows_of, start, step_row

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.signals import SignalStore, SignalWriter, _files, arrays, per_sample


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of nine steps in three parts a table."""
    with start(tmp_path / "run") as writer:
        for step in range(9):
            record(writer, step)
            if step % 3 == 2:
                writer.flush()
    return tmp_path / "run"


def test_a_foreign_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent does not exist \(no run.json\)"):
        SignalStore.open(tmp_path / "absent")
    with pytest.raises(StoreError, match=r"is not a run directory \(no run.json\)"):
        SignalStore.open(Path(__file__).parent)
    with pytest.raises(StoreError, match="is not a run directory"):
        SignalStore.open(__file__)
    for text, message in (("{", "not valid JSON"), ("[1]", "not written by finfluence"), ("{}", "not written by")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            SignalStore.open(tmp_path)


def test_a_newer_format_is_refused(run: Path) -> None:
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(StoreError, match="format version 2, this finfluence reads 1"):
        SignalStore.open(run)


@pytest.mark.parametrize("table", ["signals", "steps", "panel"])
def test_truncated_and_foreign_parts_are_named(run: Path, table: str) -> None:
    part = run / table / "part-00000001.parquet"
    whole = part.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not a Parquet file at all"):
        part.write_bytes(data)
        with pytest.raises(StoreError, match=rf"{table}/part-00000001.parquet is not a readable Parquet file"):
            SignalStore.open(run)
    pq.write_table(pa.table({"step": [1], "price": [2.0]}), part)
    with pytest.raises(StoreError, match=r"part-00000001.parquet has columns step, price"):
        SignalStore.open(run)
    part.write_bytes(whole)
    assert_holds(SignalStore.open(run), range(9))


def test_a_part_of_other_types_is_named(run: Path) -> None:
    table = pa.table({"step": [1], "sample": ["a"], "first": pa.array([1.0], pa.float32()), "second": [1.0]})
    pq.write_table(table, run / "signals/part-extra.parquet")
    with pytest.raises(StoreError, match="holds 'sample' as string, this run as int64"):
        SignalStore.open(run)


def test_damaged_pages_are_found_by_their_checksum(run: Path) -> None:
    part = run / "signals/part-00000000.parquet"
    data = bytearray(part.read_bytes())
    column = pq.read_metadata(part).row_group(0).column(3)
    data[column.data_page_offset + column.total_compressed_size - 2] ^= 0x01  # the last value of "second"
    part.write_bytes(bytes(data))
    assert arrays(SignalStore.open(run), "first").values.size
    with pytest.raises(StoreError, match=r"part-00000000.parquet is not a readable Parquet file"):
        arrays(SignalStore.open(run), "second")


def test_a_copied_part_is_found(run: Path) -> None:
    shutil.copy(run / "steps/part-00000001.parquet", run / "steps/part-00000007.parquet")
    with pytest.raises(StoreError, match="holds step 3 more than once"):
        SignalStore.open(run)


def test_leftovers_of_a_killed_flush_are_not_shown_and_are_dropped_on_resuming(run: Path) -> None:
    (run / "signals/.part-00000003.parquet.tmp").write_bytes(b"half of a part")
    (run / ".run.json.tmp").write_bytes(b"{")
    orphan = pa.table({"step": [8, 9], "sample": [1, 2]})
    for query in ("first", "second"):
        orphan = orphan.append_column(query, pa.array([1.0, 2.0], pa.float32()))
    pq.write_table(orphan, run / "live/part-orphan.parquet")
    rows = rows_of(SignalStore.open(run), "live")
    assert rows[-1] == (8, 1, 1.0, 1.0)  # of a recorded step: shown; step 9 has no row in `steps`
    assert_holds(SignalStore.open(run), range(9), ("steps", "signals", "panel"))
    assert arrays(SignalStore.open(run), "first", table="live").steps[-1] == 8

    SignalWriter.resume(run).close()
    assert pq.read_table(run / "live/part-orphan.parquet")["step"].to_pylist() == [8]
    assert not list(run.rglob("*.tmp")) + list(run.rglob(".*"))
    (run / "live/part-orphan.parquet").unlink()
    assert_holds(SignalStore.open(run), range(9))


def test_a_run_still_being_written(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    record(writer, 0)
    writer.flush()
    record(writer, 1)
    with pytest.raises(StoreError, match=rf"is a run still being written by process {os.getpid()}.*partial=True"):
        SignalStore.open(tmp_path / "run")
    store = SignalStore.open(tmp_path / "run", partial=True)
    assert store.status == "running"
    assert_holds(store, range(1))
    writer.close()
    assert_holds(store, range(1))  # as it stood when it was opened
    assert_holds(SignalStore.open(tmp_path / "run"), range(2))


def test_another_living_process_locks_out_a_second_writer(tmp_path: Path) -> None:
    start(tmp_path / "run")
    path = tmp_path / "run/run.json"
    manifest = json.loads(path.read_text())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "pid_started"} | {"pid": other.pid}))
        with pytest.raises(StoreError, match=f"still being written by process {other.pid}"):
            SignalWriter.resume(tmp_path / "run")
        with pytest.raises(StoreError, match=f"still being written by process {other.pid}"):
            SignalStore.open(tmp_path / "run")
        # The same number with another start time is a later process: the writer itself is gone.
        path.write_text(json.dumps(manifest | {"pid": other.pid, "pid_started": 1.0}))
        with pytest.warns(FinfluenceWarning, match="was interrupted"):
            assert SignalStore.open(tmp_path / "run").status == "interrupted"
        other.communicate(b"\n")
    path.write_text(json.dumps(manifest | {"host": "elsewhere"}))
    with pytest.warns(FinfluenceWarning, match="was not closed by process .* on host elsewhere"):
        SignalStore.open(tmp_path / "run")


def test_steps_need_not_be_numbered_without_gaps(tmp_path: Path) -> None:
    with start(tmp_path / "run") as writer:
        for step in (2, 30, 31, 400):
            record(writer, step)
            writer.flush()
    store = SignalStore.open(tmp_path / "run")
    assert_holds(store, (2, 30, 31, 400))
    assert set(arrays(store, "first").steps.tolist()) == {2, 30, 31, 400}


def test_an_empty_run_has_empty_tables(tmp_path: Path) -> None:
    start(tmp_path / "run").close()
    store = SignalStore.open(tmp_path / "run")
    assert_holds(store, ())
    assert store.samples().collect().columns == ["sample"]
    assert per_sample(store, "first").height == 0
    assert arrays(store, "first").values.size == 0


def test_samples_come_from_the_table_or_from_the_signals(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {"sample": [name_of(i, "int64") for i in range(N_SAMPLES)], "label": [i % 3 for i in range(40)]}
    )
    for name, samples in (("with", table), ("without", None)):
        with start(tmp_path / name, samples=samples) as writer:
            for step in range(12):
                record(writer, step)
    assert SignalStore.open(tmp_path / "with").samples().collect().equals(table)
    store = SignalStore.open(tmp_path / "without")
    seen = {row[-3] for name in ("signals", "live", "panel") for row in rows_of(store, name)}
    assert store.samples().collect()["sample"].to_list() == sorted(seen)


def test_unknown_queries_and_tables_are_named(run: Path) -> None:
    store = SignalStore.open(run)
    with pytest.raises(InputError, match=r"unknown query 'third'; .* has 'first', 'second'"):
        per_sample(store, "third")
    with pytest.raises(InputError, match="table 'steps' is not one of"):
        store.signals("steps")  # pyright: ignore[reportArgumentType]


@pytest.fixture
def memory() -> Any:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("put", ["put", "move"])
@pytest.mark.parametrize("id_dtype", ["int64", "str"])
def test_a_run_on_an_fsspec_file_system(memory: Any, monkeypatch: pytest.MonkeyPatch, put: str, id_dtype: str) -> None:
    if put == "move":
        monkeypatch.setattr(_files, "ATOMIC_PUT_PROTOCOLS", frozenset())
    url = "memory://cluster/runs/a"
    with pytest.raises(StoreError, match="memory://cluster/runs/a does not exist"):
        SignalStore.open(url)
    writer = start(url, id_dtype=id_dtype, buffer_rows=10)
    for step in range(14):
        record(writer, step)
    writer.flush()
    writer = start(url, id_dtype=id_dtype, exist="resume")
    writer.truncate_from(7)
    for step in range(7, 20):
        record(writer, step)
    writer.close()
    with pytest.raises(StoreError, match="already holds a run"):
        start(url, id_dtype=id_dtype)
    store = SignalStore.open(url)
    assert_holds(store, range(20))
    first = store.signals().filter(pl.col("step") >= 18).select("second", "step").collect(engine="streaming")
    assert first.rows() == [(row[3], row[0]) for row in rows_of(store, "signals") if row[0] >= 18]
    assert store.signals().head(3).collect().rows() == rows_of(store, "signals")[:3]
    assert int(per_sample(store, "first")["visits"].sum()) == len(rows_of(store, "signals"))
    assert not [name for name in memory.find("/cluster") if name.endswith(".tmp")]


class FullFileSystem(MemoryFileSystem):
    """A file system with room for little: its put writes half of what does not fit, and reports a full disk."""

    protocol = "full"
    room = 60_000

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if len(value) > self.room:
            super().pipe_file(path, value[: len(value) // 2], mode=mode)
            raise OSError(28, "No space left on device")
        super().pipe_file(path, value, mode=mode)


def test_a_full_fsspec_file_system(memory: Any) -> None:
    fsspec.register_implementation("full", FullFileSystem, clobber=True)
    writer = start("full://runs/b")
    for step in range(4):
        record(writer, step)
    writer.flush()
    noise = np.random.default_rng(0).standard_normal((20_000, 2))
    writer.append_signals(4, np.zeros(20_000, dtype=np.int64), noise)
    writer.append_steps(**step_row(4))
    with pytest.raises(StoreError, match=r"full://runs/b/signals/part-00000001.*No space left.*intact, free space"):
        writer.flush()
    assert not [name for name in memory.find("/") if name.endswith(".tmp")]
    assert_holds(SignalStore.open("full://runs/b", partial=True), range(4))


def test_the_floor_imports_without_torch() -> None:
    code = "import sys, finfluence.signals; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
