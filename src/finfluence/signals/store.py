"""The reader of a run directory: its manifest, and its tables as polars LazyFrames."""

from __future__ import annotations

import os
import warnings
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from finfluence.errors import FinfluenceWarning, InputError, StoreError
from finfluence.signals import _manifest as manifests
from finfluence.signals import _schema as schemas
from finfluence.signals._files import Folder, open_folder
from finfluence.signals._parts import Part
from finfluence.signals._samples import SAMPLES_FILE, read_samples
from finfluence.signals._scan import scan
from finfluence.signals._schema import COMMIT_ORDER, IdDtype, SignalTable, Table
from finfluence.signals._truncation import inspect_table, recorded_steps

Status = Literal["finished", "failed", "interrupted", "running"]


class SignalStore:
    """A run directory as it stood when it was opened; rows of steps without a row in `steps` are never shown.

    Attributes:
        directory: the path or URL of the run.
        manifest: run.json's fields.
        queries: the names of the queries, in column order.
        id_dtype: the type of the sample identifiers.
        status: "finished", "failed", "interrupted" (its process is gone) or "running".
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any], *, status: Status) -> None:
        """Use `open`."""
        self.directory = folder.display
        self.manifest = manifest
        self.status = status
        try:
            self.queries = schemas.check_queries(manifest["queries"])
            self.id_dtype: IdDtype = schemas.check_id_dtype(manifest["id_dtype"])
        except InputError as error:
            raise StoreError(f"{folder.path(manifests.FILE)}: {error}") from error
        self._folder = folder
        self._schemas = {table: schemas.table_schema(table, self.queries, self.id_dtype) for table in COMMIT_ORDER}
        # `steps` is listed first: a writer commits a step's signals before its row, so that every step that is seen
        # here has its signals among the parts that are listed after.
        self._parts: dict[Table, list[Part]] = {}
        for table in reversed(COMMIT_ORDER):
            self._parts[table] = inspect_table(folder, table, self._schemas[table])
        self._steps = recorded_steps(folder, self._parts["steps"])
        twice = self._steps[1:][np.diff(self._steps) == 0]
        if twice.size:
            raise StoreError(
                f"{folder.path('steps')} holds step {twice[0]} more than once, its parts are of several runs; "
                "restore the directory from a copy"
            )

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, partial: bool = False) -> Self:
        """Open a run directory for reading.

        Args:
            directory: local path or fsspec URL.
            partial: read the steps recorded so far of a run that is still being written.

        Raises:
            StoreError: no run is there, it is still being written, or a part is truncated or foreign.
        """
        folder = open_folder(directory)
        manifest = manifests.read_manifest(folder)
        status: Status = manifest["status"]
        if status == "running":
            state = manifests.writer_state(manifest)
            who = f"process {manifest.get('pid')} on host {manifest.get('host')}"
            if state == "alive" and not partial:
                raise StoreError(
                    f"{folder.display} is a run still being written by {who}; "
                    "wait until it ends, or read what there is with partial=True"
                )
            if state != "alive":
                status = "interrupted"
                known = "was interrupted" if state == "dead" else f"was not closed by {who}, which may still write it"
                warnings.warn(
                    f"{folder.display} {known}; reading the steps that it completed, resume it to record the rest",
                    FinfluenceWarning,
                    stacklevel=2,
                )
        elif status not in get_args(Status):
            raise StoreError(f"{folder.path(manifests.FILE)} has status {status!r}; restore it from a copy")
        return cls(folder, manifest, status=status)

    @property
    def n_steps(self) -> int:
        """Number of recorded steps."""
        return self._steps.size

    @property
    def step_numbers(self) -> npt.NDArray[np.int64]:
        """The recorded steps, sorted: (n_steps,) int64."""
        return self._steps.copy()

    def samples(self) -> pl.LazyFrame:
        """Return the sample table; without one, the sorted identifiers that occur in any table of signals."""
        return self._samples.lazy()

    def steps(self) -> pl.LazyFrame:
        """Return the step table, one row a step."""
        return scan(self._folder, self._parts["steps"], self._schemas["steps"], steps=self._steps)

    def signals(self, table: SignalTable = "signals") -> pl.LazyFrame:
        """Return a table of signals: step, sample, one float32 column a query; all tables of signals are read alike.

        Args:
            table: "signals", "live", "panel" or "self".

        Raises:
            InputError: an unknown table.
        """
        self.check_table(table)
        return scan(self._folder, self._parts[table], self._schemas[table], steps=self._steps)

    def panel(self) -> pl.LazyFrame:
        """Return the noise panel: step, epoch, position, sample, one float32 column a query."""
        return self.signals("panel")

    def watch(self) -> pl.LazyFrame:
        """Return what was observed of watched subsets: step, subset, arm, one float32 column a query.

        The arm is "with", "without" (NaN at a step whose batch held nothing but the subset) or "auxiliary".
        """
        return scan(self._folder, self._parts["watch"], self._schemas["watch"], steps=self._steps)

    def has(self, table: Table) -> bool:
        """Tell whether any part of the table is on disk."""
        return bool(self._parts[table])

    def check_query(self, query: str, table: SignalTable = "signals") -> str:
        """Return the query's name, or raise InputError when that table of the run does not have it."""
        known = schemas.table_queries(table, self.queries)
        if query not in known:
            raise InputError(f"unknown query {query!r}; {self.directory} has {', '.join(map(repr, known))}")
        return query

    def check_table(self, table: str) -> None:
        """Raise InputError when the table is not one of signals."""
        schemas.check_table(table)

    @cached_property
    def _samples(self) -> pl.DataFrame:
        if SAMPLES_FILE in self._folder.names():
            return read_samples(self._folder, self.id_dtype)
        seen = [self.signals(table).select(pl.col("sample").unique()) for table in get_args(SignalTable)]
        return pl.concat(seen).unique().sort("sample").collect(engine="streaming")
