"""The append-only writer of a run directory: atomic parts, committed step by step.

A flush writes at most one part a table, the `steps` part last. A step counts once its row in `steps` is on disk;
signals of a step without that row are never shown by the reader and are dropped when the run is resumed. A process that
is killed anywhere therefore leaves a store that holds a prefix of the steps, each of them complete.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import warnings
from array import array
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import pyarrow as pa

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.signals import _manifest as manifests
from finfluence.signals import _parts as parts
from finfluence.signals import _schema as schemas
from finfluence.signals import _truncation as truncation
from finfluence.signals._buffer import Batch, Buffer
from finfluence.signals._files import Folder, open_folder
from finfluence.signals._samples import write_samples
from finfluence.signals._schema import COMMIT_ORDER, ROW_TABLES, STEPS_SCHEMA, IdDtype, SignalTable, Table

# About 20 MB of a one-query run: parts large enough to read fast, small enough to lose and to rewrite.
BUFFER_ROWS = 1 << 20


class SignalWriter:
    """Append-only writer of a run directory.

    !!! Order within a step
        Append a step's signals first and its `append_steps` row last; `flush` then never splits a step over two parts.
        Rows of a step that has no row in `steps` yet stay in memory, whatever is flushed.

    Attributes:
        directory: the path or URL of the run.
        queries: the names of the queries, in column order.
        id_dtype: the type of the sample identifiers.
        nonfinite: number of non-finite values appended so far, for each table of signals. They are stored as they are.
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any], *, buffer_rows: int) -> None:
        """Use `create` or `resume`."""
        if buffer_rows < 1:
            raise InputError(f"buffer_rows is {buffer_rows}; use at least 1")
        self.directory = folder.display
        self.queries: tuple[str, ...] = tuple(manifest["queries"])
        self.id_dtype: IdDtype = manifest["id_dtype"]
        self.nonfinite: dict[SignalTable, int] = dict.fromkeys(schemas.SIGNAL_TABLES, 0)
        self._folder = folder
        self._manifest = manifest
        self._schemas: dict[Table, pa.Schema] = {
            table: schemas.table_schema(table, self.queries, self.id_dtype) for table in COMMIT_ORDER
        }
        self._buffers = {table: Buffer(self._schemas[table], self.id_dtype) for table in ROW_TABLES}
        self._rows: list[dict[str, Any]] = []
        self._steps = array("q")  # every step with a row in `steps`, on disk or buffered, increasing
        self._next_part = 0
        self._current: int | None = None
        self._buffer_rows = buffer_rows
        self._limit = buffer_rows
        self._closed = False

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        *,
        queries: Sequence[str],
        id_dtype: IdDtype,
        manifest: Mapping[str, Any],
        samples: pl.DataFrame | None = None,
        exist: Literal["error", "resume"] = "error",
        buffer_rows: int = BUFFER_ROWS,
    ) -> Self:
        """Start a run directory, or with `exist="resume"` continue the one that is there.

        Args:
            directory: local path or fsspec URL; it must be missing or empty, or hold a run that is to be resumed.
            queries: names of the queries, one float32 column each.
            id_dtype: type of the sample identifiers.
            manifest: further fields of run.json; on resuming they replace those of the same name.
            samples: the sample table, see `write_samples`.
            exist: what to do with a run that is already there.
            buffer_rows: rows of signals kept in memory before a part is written.

        Raises:
            InputError: a query name, identifier type, manifest field or sample table that cannot be used.
            StoreError: the directory holds a run (with `exist="error"`), a run of other queries, one that another
                process still writes, or something that is not a run.
        """
        names = schemas.check_queries(queries)
        id_dtype = schemas.check_id_dtype(id_dtype)
        if exist not in ("error", "resume"):
            raise InputError(f"exist is {exist!r}; use 'error' or 'resume'")
        manifests.check_fields(manifest)
        if samples is not None:
            samples = schemas.check_samples(samples, id_dtype)
        folder = open_folder(directory)
        if manifests.holds_run(folder):
            if exist == "error":
                raise StoreError(
                    f"{folder.display} already holds a run; choose another directory, or resume it with exist='resume'"
                )
            writer = cls.resume(directory, buffer_rows=buffer_rows)
            manifests.check_same(folder, writer._manifest, queries=list(names), id_dtype=id_dtype)
            writer.update_manifest(**manifest)
        else:
            described = {"format": manifests.FORMAT, "format_version": manifests.FORMAT_VERSION, **manifest}
            described |= {"queries": list(names), "id_dtype": id_dtype, **manifests.ownership()}
            writer = cls(folder, described, buffer_rows=buffer_rows)
            manifests.write_manifest(folder, described)
        if samples is not None:
            writer.write_samples(samples)
        return writer

    @classmethod
    def resume(cls, directory: str | os.PathLike[str], *, buffer_rows: int = BUFFER_ROWS) -> Self:
        """Continue a run that is on disk: drop what an interrupted flush left, and append behind the last step.

        Args:
            directory: local path or fsspec URL of a run.
            buffer_rows: rows of signals kept in memory before a part is written.

        Raises:
            StoreError: no run is there, or another process still writes it.
        """
        folder = open_folder(directory)
        manifest = manifests.read_manifest(folder)
        manifests.check_abandoned(folder, manifest)
        writer = cls(folder, manifest | manifests.ownership(), buffer_rows=buffer_rows)
        writer._steps = array("q", truncation.recover(folder, writer._schemas))
        writer._next_part = 1 + max(
            (parts.part_number(name) for table in COMMIT_ORDER for name in parts.part_names(folder, table)), default=-1
        )
        manifests.write_manifest(folder, writer._manifest)
        return writer

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of run.json's fields."""
        return dict(self._manifest)

    @property
    def last_step(self) -> int | None:
        """The last step that has a row in `steps`, flushed or not; None when there is none."""
        return self._steps[-1] if self._steps else None

    def update_manifest(self, **fields: Any) -> None:
        """Set fields of run.json; the file is replaced atomically.

        Raises:
            InputError: a field that the store keeps itself, or one that JSON cannot hold.
        """
        manifests.check_fields(fields)
        updated = self._manifest | fields
        manifests.write_manifest(self._folder, updated)
        self._manifest = updated

    def write_samples(self, frame: pl.DataFrame) -> None:
        """Write the sample table, one row a sample.

        Args:
            frame: a column `sample` of unique identifiers in the run's type, and any further columns to read and group
                by (label, text, source). On a resumed run it must name the samples that are already there.

        Raises:
            InputError: identifiers that are missing, repeated, of the other type, or not those of the run.
        """
        write_samples(self._folder, frame, id_dtype=self.id_dtype)

    def append_signals(self, step: int, samples: Any, values: Any) -> None:
        """Append the signals of a step's batch.

        Args:
            step: the step's number.
            samples: (b,) sample identifiers.
            values: (b, n_queries) signals, units of each query's measurement.

        Raises:
            InputError: shapes or identifiers that do not fit the run.
        """
        self.append_table("signals", step, samples=samples, values=values)

    def append_panel(self, step: int, epoch: int, position: int, samples: Any, values: Any) -> None:
        """Append what the noise panel's samples would have given at a step, had they been in its batch.

        Args:
            step: the step's number.
            epoch: the step's epoch.
            position: the step's position within its epoch.
            samples: (b,) sample identifiers.
            values: (b, n_queries) signals with the weight 1/b of a sample of that step's batch.

        Raises:
            InputError: shapes or identifiers that do not fit the run.
        """
        self.append_table("panel", step, samples=samples, values=values, epoch=epoch, position=position)

    def append_watch(self, step: int, subset: str, arm: str, values: Any) -> None:
        """Append what was observed of a watched subset at a step, before or after the step's row.

        Args:
            step: the step's number.
            subset: the subset's name.
            arm: "with", "without" or "auxiliary".
            values: (n_queries,) observations, units of each query's measurement; NaN where there is none.

        Raises:
            InputError: values of another shape, or an unknown arm.
        """
        self._check_open()
        if arm not in schemas.ARMS:
            raise InputError(f"arm is {arm!r}; use one of {', '.join(schemas.ARMS)}")
        rows = schemas.as_values(np.asarray(values)[None, ...], 1, self.queries)
        step = schemas.as_int("step", step)
        self._begin(step)
        self._buffers["watch"].add(Batch(step, {"subset": str(subset), "arm": arm}, [], rows))

    def append_table(
        self,
        table: SignalTable,
        step: int,
        *,
        samples: Any,
        values: Any,
        epoch: int | None = None,
        position: int | None = None,
    ) -> None:
        """Append a step's rows to any table of signals.

        Args:
            table: "signals", "live", "panel" or "self".
            step: the step's number.
            samples: (b,) sample identifiers.
            values: (b, n_queries) signals.
            epoch: the step's epoch, for "panel" alone.
            position: the step's position within its epoch, for "panel" alone.

        Raises:
            InputError: shapes or identifiers that do not fit the run.
        """
        schemas.check_table(table)
        self._check_open()
        if (table == "panel") != (epoch is not None and position is not None):
            raise InputError(f"epoch={epoch}, position={position} for table {table!r}; only 'panel' has both, always")
        ids = schemas.as_ids(samples, self.id_dtype)
        rows = schemas.as_values(values, len(ids), schemas.table_queries(table, self.queries))
        step = schemas.as_int("step", step)
        place = {"epoch": schemas.as_int("epoch", epoch or 0), "position": schemas.as_int("position", position or 0)}
        self._begin(step)
        self._buffers[table].add(Batch(step, place, ids, rows))
        self.nonfinite[table] += rows.size - int(np.count_nonzero(np.isfinite(rows)))

    def append_steps(self, **columns: Any) -> None:
        """Append a step's row, which completes the step; steps come in increasing order.

        Args:
            columns: a value for each column of the `steps` table (`STEPS_COLUMNS`); None for one that is not known,
                except `step`.

        Raises:
            InputError: a column too many or too few, or a step that is not behind the last one.
        """
        self._check_open()
        row = schemas.as_step_row(columns)
        step: int = row["step"]
        if self._steps and step <= self._steps[-1]:
            raise InputError(
                f"step {step} comes after step {self._steps[-1]}, which is recorded; "
                f"drop the later steps first with truncate_from({step})"
            )
        self._begin(step)
        self._rows.append(row)
        self._steps.append(step)

    def flush(self) -> None:
        """Write one part for each table with rows of finished steps, and make them durable.

        Raises:
            StoreError: the disk is full or refuses the part. What was written before is intact, the rows stay in
                memory, and a later flush writes them under the same names.
        """
        written = False
        name = parts.numbered(self._next_part)
        for table in ROW_TABLES:
            batches = self._buffers[table].select(self._is_finished)
            if batches:
                self._write_part(table, name, self._buffers[table].table(batches))
                written = True
        if self._rows:
            self._write_part("steps", name, pa.Table.from_pylist(self._rows, schema=STEPS_SCHEMA))
            written = True
        if not written:
            return
        # Only now: had a part failed, the same number would have been written again, replacing those that succeeded.
        self._next_part += 1
        self._rows = []
        for buffer in self._buffers.values():
            buffer.drop(self._is_finished)
        self._limit = self._buffer_rows + self._buffered()

    def parts(self, table: Table) -> list[str]:
        """List the names of the table's parts on disk, e.g. to skip the segments that a replay has finished."""
        return parts.part_names(self._folder, table)

    def replace_part(self, table: SignalTable, name: str, frame: pl.DataFrame) -> None:
        """Write a part under a name of the caller's, replacing one of that name, atomically.

        A replay writes segment after segment from the end of the run: a segment that is written again replaces itself.

        Args:
            table: "signals", "live", "panel" or "self".
            name: letters, digits, '.', '_' and '-', with at least one that is no digit; the file is
                `part-<name>.parquet`.
            frame: the table's columns. Rows of steps without a row in `steps` are stored and not shown.

        Raises:
            InputError: a name or columns that do not fit.
            StoreError: the disk is full or refuses the part; one of that name is as it was.
        """
        schemas.check_table(table)
        self._check_open()
        parts.check_part_name(name)
        self._write_part(table, name, schemas.conform(frame, self._schemas[table]))

    def clear(self, table: SignalTable) -> None:
        """Delete every part of a table of signals, e.g. before it is replayed with other settings."""
        schemas.check_table(table)
        self._check_open()
        for name in parts.part_names(self._folder, table):
            self._folder.remove(parts.part_file(table, name))
        self._buffers[table].drop(lambda _: True)

    def truncate_from(self, step: int) -> None:
        """Drop every row whose step is `step` or later, so that the run continues from a state saved before it.

        Args:
            step: first step to be recorded again.

        Raises:
            StoreError: a part cannot be rewritten; a killed truncation leaves a readable run and can be repeated.
        """
        self._check_open()
        step = schemas.as_int("step", step)
        self._rows = [row for row in self._rows if row["step"] < step]
        for buffer in self._buffers.values():
            buffer.drop(lambda seen: seen >= step)
        truncation.truncate(self._folder, self._schemas, step)
        self._steps = self._steps[: bisect.bisect_left(self._steps, step)]
        self._current = None

    def close(self, status: Literal["finished", "failed"] = "finished") -> None:
        """Flush, and write the run's status; closing again does nothing.

        Rows of steps without a row in `steps` are not written; a finished run that has any is warned of.

        Raises:
            StoreError: the last parts or run.json could not be written; the writer stays open.
        """
        if status not in ("finished", "failed"):
            raise InputError(f"status is {status!r}; use 'finished' or 'failed'")
        if self._closed:
            return
        self.flush()
        left = sorted({step for buffer in self._buffers.values() for step in buffer.steps()})
        updated = self._manifest | {"status": status}
        manifests.write_manifest(self._folder, updated)
        self._manifest = updated
        self._closed = True
        if left and status == "finished":
            warnings.warn(
                f"{self._buffered()} signals of step {left[0]} and later were dropped, because these steps have no row "
                "in 'steps'; call append_steps for every step",
                FinfluenceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close("finished")
            return
        # The error that ended the run is the one to report, not that its status could not be written either.
        with contextlib.suppress(StoreError):
            self.close("failed")

    def _begin(self, step: int) -> None:
        # Parts are cut between steps: a new step number means that the rows of the one before are complete.
        if step != self._current:
            if self._buffered() >= self._limit:
                self.flush()
            self._current = step

    def _buffered(self) -> int:
        return sum(buffer.rows for buffer in self._buffers.values()) + len(self._rows)

    def _is_finished(self, step: int) -> bool:
        index = bisect.bisect_left(self._steps, step)
        return index < len(self._steps) and self._steps[index] == step

    def _write_part(self, table: Table, name: str, rows: pa.Table) -> None:
        self._folder.write(parts.part_file(table, name), parts.encode_part(rows))

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the writer of {self.directory} is closed; continue with SignalWriter.resume")
