"""Frames for people and for programs: tables on a terminal, CSV, JSON lines and Parquet on standard output."""

from __future__ import annotations

import io
import sys
from typing import Any, Literal

import polars as pl
from rich.console import Console
from rich.table import Table

from finfluence.errors import InputError

Format = Literal["table", "csv", "json", "parquet"]
# column → (title, number format)
_NUMBERS = {
    "mu": ("μ", "{:+.2f}"),
    "q_value": ("q", "{:.3f}"),
    "p_value": ("p", "{:.3f}"),
    "se": ("se", "{:.2f}"),
    "relative": ("relative μ", "{:+.2f}"),
    "first_order": ("first order", "{:+.2f}"),
}


def cell(name: str, value: Any) -> str:
    """One value as a person reads it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    if name in _NUMBERS and isinstance(value, float):
        return _NUMBERS[name][1].format(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def print_table(frame: pl.DataFrame, *, title: str, level: float = 0.95) -> None:
    """Prints an influence frame, the interval as one column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    columns = [c for c in frame.columns if c not in ("ci_low", "ci_high")]
    for column in columns:
        numeric = frame[column].dtype.is_numeric()
        table.add_column(_NUMBERS.get(column, (column.replace("_", " "),))[0], justify="right" if numeric else "left")
        if column == "mu" and "ci_low" in frame.columns:
            table.add_column(f"{level:.0%} interval", justify="right")
    for row in frame.iter_rows(named=True):
        cells: list[str] = []
        for column in columns:
            cells.append(cell(column, row[column]))
            if column == "mu" and "ci_low" in frame.columns:
                low, high = row["ci_low"], row["ci_high"]
                cells.append("–" if low is None else f"{low:+.2f} to {high:+.2f}")
        table.add_row(*cells)
    Console(soft_wrap=True).print(table, highlight=False)


def write_frame(frame: pl.DataFrame, style: Format) -> None:
    """Writes a frame to standard output for programs.

    Raises:
        InputError: Parquet to a terminal.
    """
    if style == "csv":
        print(frame.write_csv(), end="")
    elif style == "json":
        print(frame.write_ndjson(), end="")
    else:
        if sys.stdout.isatty():
            raise InputError(
                "Parquet is binary; redirect standard output to a file: finfluence score ... > scores.parquet"
            )
        sink = io.BytesIO()
        frame.write_parquet(sink)
        sys.stdout.buffer.write(sink.getvalue())
