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

import polars as pl

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.signals import _manifest as manifests
from finfluence.signals import _parts as parts
from finfluence.signals import _schema as schemas
from finfluence.signals import _truncation as truncation
from finfluence.signals._appender import Appender
from finfluence.signals._files import open_folder
from finfluence.signals._samples import write_samples
from finfluence.signals._schema import COMMIT_ORDER, IdDtype, SignalTable, Table

# About 20 MB of a one-query run: parts large enough to read fast, small enough to lose and to rewrite.
BUFFER_ROWS = 1 << 20


class SignalWriter(Appender):
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

    def write_samples(self, frame: pl.DataFrame, *, grown: bool = False) -> None:
        """Write the sample table, one row a sample.

        Args:
            frame: a column `sample` of unique identifiers in the run's type, and any further columns to read and group
                by (label, text, source). On a resumed run it must name the samples that are already there.
            grown: whether it may name further ones.

        Raises:
            InputError: identifiers that are missing, repeated, of the other type, or not those of the run.
        """
        write_samples(self._folder, frame, id_dtype=self.id_dtype, grown=grown)

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
