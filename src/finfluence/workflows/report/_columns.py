"""What the page shows of the samples: their categories, their texts as far as they fit, further figures."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finfluence.signals import IdDtype
from finfluence.workflows.report._packing import Budget, Payload, floats

# Columns that are bookkeeping, not something to read.
_HIDDEN = ("content_hash",)
_TEXT_NAMES = ("text", "prompt", "instruction", "content", "messages", "question", "document", "sentence")
_MOST_CATEGORIES = 60
_GAUGE = 4000  # rows from which the size of all texts is judged
_SHORT_LENGTHS = (240, 160, 120, 90, 60, 40, 24, 12)
_LONG_LENGTHS = (8000, 4000, 2000, 1000, 500, 250, 120)
_LARGEST_EXACT = 2**53


@dataclass(frozen=True)
class SampleColumns:
    """The sample table, sorted by what can be done with its columns.

    Attributes:
        categories: columns with few distinct values: filters and groups.
        texts: columns to read, the main one first.
        numbers: numeric columns with many values.
        images: name of the column that holds encoded images, if any.
    """

    frame: pl.DataFrame
    categories: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    images: str | None


@dataclass
class Cuts:
    """What was left out of the page so that it stays small, in words."""

    notes: list[str] = field(default_factory=list)


def ends(mu: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Codes of the `count` lowest and the `count` highest μ, the lowest first, then the highest, without repetition."""
    order = np.argsort(mu, kind="stable")
    order = order[np.isfinite(mu[order])]
    both = np.concatenate([order[:count], order[::-1][:count]])
    return both[np.sort(np.unique(both, return_index=True)[1])]


def sort_columns(frame: pl.DataFrame) -> SampleColumns:
    """Decide what each column of a sample table is for.

    Args:
        frame: the sample table.
    """
    categories: list[str] = []
    texts: list[str] = []
    numbers: list[str] = []
    images: str | None = None
    for name, series in zip(frame.columns, frame.get_columns(), strict=True):
        if name == "sample" or name in _HIDDEN:
            continue
        if series.dtype == pl.Binary:
            if images is None and _is_image(series):
                images = name
            continue
        if series.dtype.is_nested() or series.dtype == pl.Object:
            series = pl.Series(name, [None if v is None else _flat(v) for v in series.to_list()], dtype=pl.String)
            frame = frame.with_columns(series)
        distinct = series.drop_nulls().n_unique()
        if distinct == 0:
            continue
        short = series.dtype != pl.String or (series.str.len_chars().max() or 0) <= 80  # pyright: ignore[reportOperatorIssue]
        few = distinct <= min(_MOST_CATEGORIES, max(2, frame.height // 2))
        if few and short and not series.dtype.is_float():
            categories.append(name)
        elif series.dtype.is_numeric():
            numbers.append(name)
        else:
            frame = frame.with_columns(series.cast(pl.String))
            texts.append(name)
    texts.sort(key=lambda name: _TEXT_NAMES.index(name.lower()) if name.lower() in _TEXT_NAMES else len(_TEXT_NAMES))
    return SampleColumns(frame, tuple(categories), tuple(texts), tuple(numbers), images)


def pack_samples(
    payload: Payload,
    columns: SampleColumns,
    *,
    top: NDArray[np.int64],
    id_dtype: IdDtype,
    budget: Budget,
    cuts: Cuts,
) -> SampleColumns:
    """Put the sample table into the page's payload.

    Args:
        payload: to fill.
        columns: from `sort_columns`.
        top: codes of the rows whose texts are given at length.
        id_dtype: type of the ids.
        budget: of the page.
        cuts: collects what did not fit.

    Returns:
        The columns that are in the page.
    """
    columns = _fitting(columns, budget, cuts)
    frame = columns.frame
    payload.json("ids", _ids(frame["sample"], id_dtype))
    for name in columns.categories:
        values = frame[name].drop_nulls().unique().sort().to_list()
        codes = {value: code for code, value in enumerate(values)}
        payload.json(f"values:{name}", [category(value) for value in values])
        payload.array(f"codes:{name}", [codes.get(value, 255) for value in frame[name].to_list()], "uint8")
    for name in columns.numbers:
        payload.array(f"number:{name}", floats(frame[name]), "float32")
    if columns.texts:
        _pack_texts(payload, frame, columns.texts, top=top, budget=budget, cuts=cuts)
    return columns


def _fitting(columns: SampleColumns, budget: Budget, cuts: Cuts) -> SampleColumns:
    """The categories, then the numbers, for which there is room."""
    rows = columns.frame.height
    categories = columns.categories[: max(1, budget.columns // rows)]
    numbers = columns.numbers[: max(0, budget.columns - rows * len(categories)) // (4 * rows)]
    left = [name for name in (*columns.categories, *columns.numbers) if name not in (*categories, *numbers)]
    if left:
        cuts.notes.append(f"Columns of the sample table that are not in this page: {', '.join(left)}.")
    return replace(columns, categories=categories, numbers=numbers)


def category(value: object) -> str:
    """A category as the page writes it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _pack_texts(
    payload: Payload, frame: pl.DataFrame, names: Sequence[str], *, top: NDArray[np.int64], budget: Budget, cuts: Cuts
) -> None:
    main = frame[names[0]].fill_null("")
    # one line: rows of the table are one line high, and the folded text keeps its breaks
    lines = main.str.slice(0, 4 * _SHORT_LENGTHS[0]).str.replace_all(r"\s+", " ").str.strip_chars()
    lengths = main.str.len_chars()
    length = _short_length(lines, budget.texts)
    payload.json("short", lines.str.slice(0, length).to_list())
    payload.array("length", lengths.to_numpy(), "uint32")
    cut = int((lines.str.len_chars() > length).sum())
    if cut:
        held = f"the first {length} characters" if length else "nothing"
        cuts.notes.append(
            f"The table holds {held} of “{names[0]}”; {cut:,} of {frame.height:,} texts are longer. "
            "Search looks at what the table holds."
        )
    rows = frame[top]
    for limit in _LONG_LENGTHS:
        long = {name: rows[name].str.slice(0, limit).to_list() for name in names}
        if _deflated(long) <= budget.long_texts:
            break
    else:
        long = {}
        limit = 0
    payload.json("long", long)
    payload.json("long_total", {name: rows[name].str.len_chars().to_list() for name in names})
    longest = max((int(frame[name].str.len_chars().max() or 0) for name in names), default=0)  # pyright: ignore[reportArgumentType]
    if len(top) < frame.height or longest > limit:
        cuts.notes.append(
            f"Texts can be unfolded for {len(top):,} rows (those of lowest and highest μ of each query), up to "
            f"{limit:,} characters each; the longest text has {longest:,}."
        )


def _short_length(lines: pl.Series, room: int) -> int:
    """Characters of every text that fit, judged by evenly spaced rows."""
    every = max(1, len(lines) // _GAUGE)
    some = lines.gather_every(every)
    for length in _SHORT_LENGTHS:
        if _deflated(some.str.slice(0, length).to_list()) * len(lines) / len(some) <= room:
            return length
    return 0


def _ids(series: pl.Series, id_dtype: IdDtype) -> object:
    if id_dtype == "str":
        return series.to_list()
    values = series.to_numpy()
    if np.array_equal(values, np.arange(len(values))):
        return len(values)
    return values.tolist() if np.abs(values).max() < _LARGEST_EXACT else [str(value) for value in values]


def _is_image(series: pl.Series) -> bool:
    first = series.drop_nulls().head(1).to_list()
    return bool(first) and first[0][:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"\xff\xd8\xff\xdb")


def _flat(value: object) -> str:
    plain = value.to_list() if isinstance(value, pl.Series) else value
    return json.dumps(plain, ensure_ascii=False, default=str)


def _deflated(value: object) -> int:
    return len(zlib.compress(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), 6))


__all__ = ["Cuts", "SampleColumns", "category", "ends", "pack_samples", "sort_columns"]
