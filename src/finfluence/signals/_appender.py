"""Appending to a run directory: rows wait in memory until their step is complete, then become parts.

A flush writes at most one part a table, the `steps` part last. A step counts once its row in `steps` is on disk.
"""

from __future__ import annotations

import bisect
from array import array
from typing import Any

import numpy as np
import pyarrow as pa

from finfluence.errors import InputError, StoreError
from finfluence.signals import _parts as parts
from finfluence.signals import _schema as schemas
from finfluence.signals._buffer import Batch, Buffer
from finfluence.signals._files import Folder
from finfluence.signals._schema import COMMIT_ORDER, ROW_TABLES, STEPS_SCHEMA, IdDtype, SignalTable, Table


class Appender:
    """The rows of a run directory on their way to disk: buffered in memory, written part by part.

    Attributes:
        directory: the path or URL of the run.
        queries: the names of the queries, in column order.
        id_dtype: the type of the sample identifiers.
        nonfinite: number of non-finite values appended so far, for each table of signals. They are stored as they are.
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any], *, buffer_rows: int) -> None:
        """Start with empty buffers.

        Args:
            folder: the run directory.
            manifest: the fields of run.json.
            buffer_rows: rows of signals kept in memory before a part is written.
        """
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
