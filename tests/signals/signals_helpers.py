"""A small recorded run whose every row follows from its step number. Light: forked and killed many times."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import psutil  # noqa: F401  (here and below: imported before the forks, not in each of them)
import pyarrow.dataset  # noqa: F401

from finfluence.errors import StoreError
from finfluence.signals import SignalStore, SignalWriter

QUERIES = ("first", "second")
N_SAMPLES = 40
MANIFEST = {"n_samples": N_SAMPLES, "batch_size": 5, "epochs": 3, "seed": 11}
TABLES = ("signals", "live", "panel")


def name_of(index: int, id_dtype: str) -> Any:
    return int(index) * 3 - 20 if id_dtype == "int64" else f"doc-{index:03d}"


def batch(table: str, step: int, id_dtype: str = "int64") -> tuple[list[Any], np.ndarray]:
    """Identifiers and (b, 2) float32 signals of a step; a sample may stand in it twice, as with replacement."""
    generator = np.random.default_rng([TABLES.index(table), step])
    size = int(generator.integers(1, 7))
    ids = [name_of(i, id_dtype) for i in generator.integers(0, N_SAMPLES, size)]
    return ids, generator.standard_normal((size, 2)).astype(np.float32)


def step_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // 8,
        "position": step % 8,
        "learning_rate": 0.1 / (1 + step),
        "batch_size": 5,
        "loss": 1.0 + step,
        "residual": None if step % 4 else 1e-7,
        "scale": 1.0,
        "nonfinite": False,
        "skipped": step % 5 == 0,
    }


def record(writer: SignalWriter, step: int, *, live: bool = True) -> None:
    """Append everything of one step: signals, live signals, every third step the panel, and the step's row."""
    ids, values = batch("signals", step, writer.id_dtype)
    writer.append_signals(step, ids, values)
    if live:
        ids, values = batch("live", step, writer.id_dtype)
        writer.append_table("live", step, samples=ids, values=values)
    if step % 3 == 0:
        ids, values = batch("panel", step, writer.id_dtype)
        writer.append_panel(step, step // 8, step % 8, ids, values)
    writer.append_steps(**step_row(step))


def expected_rows(table: str, steps: Iterable[int], id_dtype: str = "int64") -> list[tuple[Any, ...]]:
    """The rows that `record` gives for these steps, as the table's columns order them."""
    rows: list[tuple[Any, ...]] = []
    for step in steps:
        if table == "steps":
            rows.append(tuple(step_row(step).values()))
        elif table != "panel" or step % 3 == 0:
            place = (step, step // 8, step % 8) if table == "panel" else (step,)
            ids, values = batch(table, step, id_dtype)
            rows += [(*place, i, float(a), float(b)) for i, (a, b) in zip(ids, values, strict=True)]
    return rows


def rows_of(store: SignalStore, table: str) -> list[tuple[Any, ...]]:
    frame = store.steps() if table == "steps" else store.signals(table)  # pyright: ignore[reportArgumentType]
    return frame.collect(engine="streaming").rows()


def assert_holds(store: SignalStore, steps: Iterable[int], tables: Iterable[str] = ("steps", *TABLES)) -> None:
    """Assert that the store shows exactly what `record` wrote for these steps."""
    steps = list(steps)
    for table in tables:
        assert rows_of(store, table) == expected_rows(table, steps, store.id_dtype), table


def start(directory: Any, **changes: Any) -> SignalWriter:
    arguments: dict[str, Any] = {"queries": QUERIES, "id_dtype": "int64", "manifest": MANIFEST} | changes
    return SignalWriter.create(directory, **arguments)


def last_state(step: int | None, every: int = 10) -> int:
    """The first step after the last saved state of a run that completed `step`."""
    return 0 if step is None else (step + 1) // every * every


def say(*words: object) -> None:
    """Report a line in one write: print makes several where output is unbuffered, and a kill would tear the line."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def train(directory: str, n_steps: int, flush_every: int) -> None:
    """A training process: resumes from its last state whatever it finds, records the rest, closes."""
    # A killed process loses nothing that the kernel has: without the wait for the disk, kills fall on the rest.
    os.fsync = lambda _: None
    say("started")
    writer = start(directory, exist="resume")
    say("resumed")
    writer.truncate_from(last_state(writer.last_step))
    for step in range(last_state(writer.last_step), n_steps):
        say("step", step)
        record(writer, step)
        if step % flush_every == 0:
            writer.flush()
    writer.close()


def fill_disk(directory: str, limit: int) -> None:
    """Record under a limit on the size of a file until a part is refused; print what the error said."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writer = start(directory)
    for step in range(4):
        record(writer, step)
    writer.flush()
    values = np.random.default_rng(0).standard_normal((limit, 2))
    try:
        with writer:
            writer.append_signals(4, np.zeros(limit, dtype=np.int64), values)
            writer.append_steps(**step_row(4))
    except StoreError as error:
        say(error)


def serve() -> None:
    """Fork one process for each line of standard input, so that each starts in milliseconds; report how it ended."""
    for line in sys.stdin:
        name, directory, *numbers = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            {"train": train, "fill_disk": fill_disk}[name](directory, *map(int, numbers))
            os._exit(0)
        say("pid", pid)
        # The process stays a zombie until the answer, so that its number cannot be another's when it is killed.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        say("exit", ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        sys.stdin.readline()
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
