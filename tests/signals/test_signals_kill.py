"""A writer that dies anywhere leaves a store that reads rightly and resumes to what an uninterrupted run gives."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import signals_helpers
from signals_helpers import (
    TABLES,
    assert_holds,
    expected_rows,
    last_state,
    record,
    rows_of,
    start,
)

from finfluence.errors import FinfluenceWarning, StoreError
from finfluence.signals import SignalStore, SignalWriter, _files

N_STEPS = 60
KILLS = 50


class Processes:
    """Training processes, forked from one that has imported the store and nothing slow."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, signals_helpers.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, name: str, *arguments: object, kill_after: int | None = None, delay: float = 0
    ) -> tuple[int, list[str]]:
        """Run a function of the helpers; return its exit code and its lines of output.

        With `kill_after`, it is killed `delay` seconds after it has printed that many lines.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write("\t".join([name, *map(str, arguments)]) + "\n")
        self._server.stdin.flush()
        pid, lines = 0, []
        for line in self._server.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "exit":
                self._server.stdin.write("reap\n")
                self._server.stdin.flush()
                return int(rest), lines
            if word == "pid":
                pid = int(rest)
            else:
                lines.append(line.rstrip("\n"))
            if pid and kill_after is not None and len(lines) >= kill_after:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the server of training processes died")

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    server = Processes()
    yield server
    server.close()


def open_interrupted(directory: Path) -> SignalStore:
    with pytest.warns(FinfluenceWarning, match="was interrupted"):
        store = SignalStore.open(directory)
    assert store.status == "interrupted"
    return store


def test_fifty_kills_at_random_times(processes: Processes, scratch: Path) -> None:
    # Seed 20251 draws how far each process gets (in progress reports) and where within the next few flushes it dies.
    # A right store never fails; that the kills reach fewer than 5 lengths of run has a probability below 1e-6.
    draws = random.Random(20251)
    assert processes.run("train", scratch / "whole", N_STEPS, 2)[0] == 0
    whole = SignalStore.open(scratch / "whole")
    assert_holds(whole, range(N_STEPS))

    directory, kills, reached = scratch / "killed", 0, set()
    while kills < KILLS:
        progress, delay = draws.randrange(40), draws.uniform(0.0, 0.01)
        code, _ = processes.run("train", directory, N_STEPS, 2, kill_after=progress, delay=delay)
        if code == 0:
            assert_holds(SignalStore.open(directory), range(N_STEPS))
            shutil.rmtree(directory)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        if not (directory / "run.json").exists():
            assert not list(directory.rglob("*.parquet"))
            continue
        if json.loads((directory / "run.json").read_text())["status"] == "finished":
            continue  # killed on its way out
        store = open_interrupted(directory)
        assert_holds(store, range(store.n_steps))
        reached.add(store.n_steps)

    # The kills must have hit runs at work, not only before their start.
    assert len(reached) >= 5
    assert processes.run("train", directory, N_STEPS, 2)[0] == 0
    resumed = SignalStore.open(directory)
    assert resumed.status == "finished"
    for table in ("steps", *TABLES):
        assert rows_of(resumed, table) == rows_of(whole, table)
    assert not [path for path in directory.rglob("*") if path.name.endswith(".tmp")]


class Crash(BaseException):
    """The process is gone: raised at one file operation, and at every later one."""


class CrashingOs:
    """The os module of a process that dies at its n-th file operation; a write that dies is cut in half.

    Nothing is synced for real: it costs most of the time and shows only in a power cut.
    """

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.count = fatal, 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "unlink"):
            return function

        def call(*arguments: Any) -> Any:
            self.count += 1
            if self.fatal is not None and self.count >= self.fatal:
                if name == "write" and self.count == self.fatal:
                    os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            return None if name == "fsync" else function(*arguments)

        return call


def scenario(directory: Path) -> None:
    """Record six steps in three flushes, replay two segments, go back to step 3, record it and the rest again."""
    writer = start(directory, exist="resume", samples=pl.DataFrame({"sample": [i * 3 - 20 for i in range(40)]}))
    finish(writer)


def finish(writer: SignalWriter) -> None:
    for _ in range(2):
        first = (writer.last_step + 1) if writer.last_step is not None else 0
        for step in range(first, 6):
            record(writer, step, live=False)
            if step % 2:
                writer.flush()
        writer.flush()
        for steps in ((3, 4, 5), (0, 1, 2)):
            writer.replace_part("live", f"segment-{steps[0]}", live_segment(steps))
        if writer.manifest.get("went_back") is None:
            writer.truncate_from(3)
            writer.update_manifest(went_back=True)
    writer.close()


def live_segment(steps: tuple[int, ...]) -> pl.DataFrame:
    rows = expected_rows("live", steps)
    return pl.DataFrame(rows, schema=["step", "sample", "first", "second"], orient="row")


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(fatal: int | None) -> CrashingOs:
        shim = CrashingOs(fatal)
        monkeypatch.setattr(_files, "os", shim)
        return shim

    return install


def test_a_crash_at_every_file_operation(crashing: Any, scratch: Path) -> None:
    counter = crashing(None)
    scenario(scratch / "whole")
    operations = counter.count
    assert operations > 100
    shown = set()
    for fatal in range(1, operations + 1):
        directory = scratch / str(fatal)
        crashing(fatal)
        with pytest.raises(Crash):
            scenario(directory)
        crashing(None)
        if (directory / "run.json").exists():
            store = SignalStore.open(directory, partial=True)
            assert_holds(store, range(store.n_steps), ("steps", "signals", "panel"))
            live = rows_of(store, "live")
            whole_segments = [s for s in (0, 3) if any(row[0] // 3 == s // 3 for row in live)]
            steps = [t for s in whole_segments for t in range(s, s + 3) if t < store.n_steps]
            assert live == expected_rows("live", steps)
            shown.add((store.n_steps, len(whole_segments)))
        scenario(directory)
        assert_holds(SignalStore.open(directory), range(6))
        assert not [path for path in directory.rglob("*") if path.name.endswith(".tmp")]
        shutil.rmtree(directory)
    assert {n for n, _ in shown} == {0, 2, 3, 4, 6}


def test_a_refused_part_leaves_the_store_intact_and_can_be_flushed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writer = start(tmp_path / "run")
    for step in range(4):
        record(writer, step)
    writer.flush()
    for step in range(4, 8):
        record(writer, step)

    class FullOs(CrashingOs):
        def __getattr__(self, name: str) -> Any:
            if name != "write":
                return getattr(os, name)

            def write(descriptor: int, data: memoryview) -> int:
                self.count += 1
                if self.count >= 3:  # two tables' parts succeed, the third is refused
                    raise OSError(28, "No space left on device")
                return os.write(descriptor, data)

            return write

    monkeypatch.setattr(_files, "os", FullOs(None))
    with pytest.raises(StoreError, match=r"panel/part-00000001.*No space left on device.*intact, free space"):
        writer.flush()
    monkeypatch.setattr(_files, "os", os)
    assert_holds(SignalStore.open(tmp_path / "run", partial=True), range(4))
    assert not list(tmp_path.rglob("*.tmp"))

    record(writer, 8)
    writer.close()
    assert_holds(SignalStore.open(tmp_path / "run"), range(9))


def test_a_full_disk_in_a_process_with_a_limit_on_file_size(processes: Processes, scratch: Path) -> None:
    code, (message,) = processes.run("fill_disk", scratch / "run", 50_000)
    assert code == 0
    assert "cannot write" in message
    assert "intact, free space and resume" in message
    assert not list(scratch.rglob("*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FinfluenceWarning)
        store = SignalStore.open(scratch / "run")
    assert store.status in ("failed", "interrupted")
    assert_holds(store, range(4))
    writer = SignalWriter.resume(scratch / "run")
    assert last_state(writer.last_step, every=2) == 4
    record(writer, 4)
    writer.close()
    assert_holds(SignalStore.open(scratch / "run"), range(5))
