"""Writing a cut: the kept rows as they stand in their file, the dropped ones beside them with their figures."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from finfluence.errors import FinfluenceWarning, InputError
from finfluence.runs.pooling import Recorded
from finfluence.runs.sources import CONTENT, Source, SourceRows, first_repeat, read_source, source_format

FIGURES = ("sample", "group", "mu", "ci_low", "ci_high", "q_value", "reason")


def dropped_path(path: Path) -> Path:
    """`cleaned.dropped.jsonl` beside `cleaned.jsonl`."""
    return path.with_name(f"{path.stem}.dropped{path.suffix}")


def check_target(path: Path, *, source: str | None) -> None:
    """Refuses to write over anything.

    Raises:
        InputError: the file or its sibling exists, its folder does not, or its suffix is not the source's format.
    """
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise InputError(f"{path} is the file to be cleaned, which is never overwritten; name another output file")
    for target in (path, dropped_path(path)):
        if target.exists():
            raise InputError(f"{target} exists and is not overwritten; name another output file or move it away")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    kind = source_format(path)
    if source is not None and kind != source_format(source):
        raise InputError(
            f"{source} is {source_format(source)} and is cut in its own format; name the output "
            f"*{Path(source).suffix}, not {path.name}"
        )


def source_of(run: Recorded, *, data: str | None, id_column: str | None) -> Source | None:
    """The file to cut: the one given, or the one that the run names; None where there is neither."""
    entry = run.manifest.get("source")
    own = None if not entry else Source.from_dict(entry)
    if data is not None:
        return Source.of(data, id_column=id_column or (own.id_column if own else None))
    return own


def write_cut(
    run: Recorded, path: Path, *, dropped: pl.DataFrame, kept: pl.Series, data: str | None, id_column: str | None
) -> tuple[Path, Path]:
    """Writes the kept rows to `path` and the dropped ones to its sibling, see `Cleaning.write`."""
    source = source_of(run, data=data, id_column=id_column)
    check_target(path, source=source.path if source else None)
    figures = dropped.select([c for c in FIGURES if c in dropped.columns])
    if source is None:
        table = run.samples().drop(CONTENT, strict=False)
        kind = source_format(path)
        comma = "\t" if path.suffix.lower() == ".tsv" else ","
        remaining = _frame_bytes(table.filter(pl.col("sample").is_in(kept.implode())), kind, comma=comma)
        removed = _frame_bytes(dropped, kind, comma=comma)
    else:
        rows = read_origin(source)
        places = matching_rows(run, rows, source)
        gone = np.array([places[str(name)] for name in dropped["sample"].to_list()], dtype=np.int64)
        rest = np.setdiff1d(np.arange(len(rows)), gone)
        remaining, removed = rows.part(rest.tolist()), _with_figures(rows, gone.tolist(), figures)
    sibling = dropped_path(path)
    _write_new(sibling, removed)
    try:
        _write_new(path, remaining)
    except BaseException:
        sibling.unlink()
        raise
    return path, sibling


def matching_rows(run: Recorded, rows: SourceRows, source: Source) -> dict[str, int]:
    """Row of the file for every sample of the run, checked to be what the run was trained on.

    Raises:
        InputError: an id twice in the file, samples that match no row, or rows that changed since the run.
    """
    samples = run.samples()
    names = [str(name) for name in samples["sample"].to_list()]
    ids = [str(name) for name in rows.ids(source.id_column)]
    places = {name: place for place, name in enumerate(ids)}
    if (repeat := first_repeat(ids)) is not None:
        raise InputError(f"{rows.path} holds the id {ids[repeat[0]]!r} in more than one row; ids must be unique")
    how = f"column {source.id_column!r}" if source.id_column else "their row's index"
    if missing := [name for name in names if name not in places]:
        raise InputError(
            f"{len(missing)} of the run's {len(names)} samples match no row of {rows.path} (by {how}), the first is "
            f"{missing[0]!r}; give the file that the run was trained on, or another --id-column"
        )
    known = CONTENT in samples.columns and run.manifest.get("content") in ("rows", "given")
    hashes = rows.hashes() if known and not samples[CONTENT].null_count() else None
    changed = [
        name
        for name, expected in zip(names, samples[CONTENT].to_list() if hashes else names, strict=True)
        if hashes is not None and hashes[places[name]] != expected
    ]
    # where the run names no file and nothing at all agrees, what was hashed are items made of the rows (tokens)
    if hashes is None or (len(changed) == len(names) and not run.manifest.get("source")):
        warnings.warn(
            f"the run holds no content hashes of the rows of {rows.path}: rows were matched by {how} alone, and one "
            "that changed since the run would not be noticed",
            FinfluenceWarning,
            stacklevel=2,
        )
    elif changed:
        raise InputError(
            f"{len(changed)} of {len(names)} rows of {rows.path} changed since the run, the first is the one of sample "
            f"{changed[0]!r}; give the file as it was (--data FILE), or record a run on the new one"
        )
    return places


def read_origin(source: Source) -> SourceRows:
    """The rows of a run's source file.

    Raises:
        InputError: it is not where it was, or cannot be read.
    """
    if not Path(source.path).exists():
        raise InputError(f"the run was trained on {source.path}, which is not here; give its copy with --data FILE")
    return read_source(source.path)


def _with_figures(rows: SourceRows, gone: list[int], figures: pl.DataFrame) -> bytes:
    """The dropped rows in the file's format, with their figures in further columns."""
    names = {c: c if c not in rows.columns else f"finfluence_{c}" for c in figures.columns}
    figures = figures.rename(names)
    if rows.format == "parquet":
        table = rows.raw.take(pa.array(gone, type=pa.int64()))
        for column in figures.columns:
            table = table.append_column(column, figures[column].to_arrow())
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()
    records: list[dict[str, Any]] = [
        rows.rows[place] | figure for place, figure in zip(gone, figures.iter_rows(named=True), strict=True)
    ]
    if rows.format == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows.columns, *figures.columns], delimiter=rows.delimiter, lineterminator=rows.end)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode("utf-8")


def _frame_bytes(frame: pl.DataFrame, kind: str, *, comma: str) -> bytes:
    sink = io.BytesIO()
    try:
        if kind == "parquet":
            frame.write_parquet(sink)
        elif kind == "csv":
            frame.write_csv(sink, separator=comma)
        else:
            frame.write_ndjson(sink)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"the sample table cannot be written as {kind} ({error}); name a .parquet file") from error
    return sink.getvalue()


def _write_new(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise InputError(f"{path} exists and is not overwritten; name another output file") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error
