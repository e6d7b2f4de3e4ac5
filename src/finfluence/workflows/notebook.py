"""How results look in a notebook."""

from __future__ import annotations

import html

import polars as pl


def text_html(text: str) -> str:
    """Text as it is, with its line breaks and columns."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'


def frame_html(frame: pl.DataFrame, *, rows: int = 10) -> str:
    """The first rows of a frame as polars shows them."""
    return frame.head(rows)._repr_html_()
