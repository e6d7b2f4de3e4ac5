"""Parts as polars LazyFrames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from finfluence.signals._files import Folder, LocalFolder
from finfluence.signals._parts import Part, read_part
from finfluence.signals._truncation import is_recorded


def scan(folder: Folder, parts: Sequence[Part], schema: pa.Schema, *, steps: npt.NDArray[np.int64]) -> pl.LazyFrame:
    """Return a table's rows whose step is recorded, lazily and in the order of the parts.

    Args:
        folder: the run directory.
        parts: the table's parts.
        schema: the table's columns.
        steps: (n_steps,) the recorded steps, sorted.
    """
    empty = pl.DataFrame(schema=_polars_schema(schema))
    if not parts:
        return empty.lazy()
    # A footer tells which parts hold recorded steps alone; almost always all of them, and nothing is filtered.
    clean = [part for part in parts if is_recorded(steps, part.first, part.last)]
    mixed = [part for part in parts if part not in clean]
    frames = [_scan_parts(folder, clean, schema)] if clean else []
    if mixed:
        recorded = pl.LazyFrame({"step": steps})
        frames.append(_scan_parts(folder, mixed, schema).join(recorded, on="step", how="semi", maintain_order="left"))
    return frames[0] if len(frames) == 1 else pl.concat(frames)


def _scan_parts(folder: Folder, parts: Sequence[Part], schema: pa.Schema) -> pl.LazyFrame:
    if isinstance(folder, LocalFolder):
        return pl.scan_parquet([folder.source(part.file) for part in parts], glob=False)

    # polars' own cloud readers know neither every fsspec protocol nor the credentials that fsspec was given.
    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        left = n_rows
        for part in parts:
            if left is not None and left <= 0:
                return
            names = schema.names if columns is None else columns
            fields = pa.schema([schema.field(name) for name in names])
            frame = pl.from_arrow(read_part(folder, part, names).select(names).cast(fields))
            assert isinstance(frame, pl.DataFrame)
            if left is not None:
                frame = frame.head(left)
                left -= frame.height
            yield frame if predicate is None else frame.filter(predicate)

    return register_io_source(read, schema=_polars_schema(schema), is_pure=True)


def _polars_schema(schema: pa.Schema) -> pl.Schema:
    empty = pl.from_arrow(schema.empty_table())
    assert isinstance(empty, pl.DataFrame)
    return empty.schema
