"""samples.parquet: one row a sample, its identifier and whatever describes it."""

from __future__ import annotations

import io

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from finfluence.errors import InputError, StoreError
from finfluence.signals._files import Folder
from finfluence.signals._parts import reading
from finfluence.signals._schema import IdDtype, check_samples

SAMPLES_FILE = "samples.parquet"


def write_samples(folder: Folder, frame: pl.DataFrame, *, id_dtype: IdDtype, grown: bool = False) -> None:
    """Write the sample table, replacing one of the same samples (or of some of them, where it has `grown`), atomically.

    Raises:
        InputError: identifiers that cannot be used, other ones than the run's, or a column that Parquet cannot hold.
    """
    frame = check_samples(frame, id_dtype)
    if SAMPLES_FILE in folder.names():
        known = read_samples(folder, id_dtype)
        same = (
            known["sample"].is_in(frame["sample"].implode()).all() if grown else known["sample"].equals(frame["sample"])
        )
        if not same:
            raise InputError(
                f"{folder.display} names other samples ({known.height}) than the sample table given "
                f"({frame.height}); resume with the data set that the run was started with"
            )
    sink = io.BytesIO()
    try:
        pq.write_table(frame.to_arrow(), sink, compression="zstd")
    except pa.ArrowException as error:
        raise InputError(
            f"the sample table has a column that Parquet cannot hold ({error}); drop or convert it"
        ) from error
    folder.write(SAMPLES_FILE, sink.getbuffer())


def read_samples(folder: Folder, id_dtype: IdDtype) -> pl.DataFrame:
    """Read the sample table.

    Raises:
        StoreError: the file is truncated or foreign, or its identifiers are not unique.
    """
    path = folder.path(SAMPLES_FILE)
    with reading(path):
        table = pq.read_table(folder.source(SAMPLES_FILE))
    try:
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return check_samples(frame, id_dtype)
    except InputError as error:
        raise StoreError(f"{path}: {error}") from error
