"""The content hash of every sample, recorded at training, so that a later cut can tell whether rows have changed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from finfluence.errors import InputError
from finfluence.runs.engine import isolated_rng
from finfluence.runs.sources import CONTENT, Source, dataset_hashes, read_source

# What the hashes are of: rows of the source file, items of the dataset, or whatever the caller hashed.
ContentKind = Literal["rows", "items", "given"]


def check_source(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entry "source" of run.json.

    Raises:
        InputError: see `Source.from_dict`.
    """
    return None if source is None else Source.from_dict(source).as_dict()


def with_content(
    table: pl.DataFrame, dataset: Any, *, source: Mapping[str, Any] | None
) -> tuple[pl.DataFrame, ContentKind | None]:
    """The sample table with a column of content hashes, and what they are of.

    Args:
        table: one row a sample; a column "content_hash" of its own stays.
        dataset: n items, read once where there is no source file; the global random states are left as they were.
        source: entry of the file that the dataset was made of.

    Returns:
        The table, and None where items have no stable content (random augmentation): then the column is null.

    Raises:
        InputError: a source file that cannot be read or lacks some of the samples.
    """
    if CONTENT in table.columns:
        return table, "given"
    if source is not None:
        origin = Source.from_dict(source)
        rows = read_source(origin.path)
        known = dict(zip(map(str, rows.ids(origin.id_column)), rows.hashes(), strict=True))
        names = [str(name) for name in table["sample"].to_list()]
        if missing := [name for name in names if name not in known]:
            raise InputError(
                f"{origin.path} has no row for {len(missing)} of the {len(names)} samples, the first is {missing[0]!r};"
                " name the source's id_column, or give the table of samples a column content_hash"
            )
        return table.with_columns(pl.Series(CONTENT, [known[name] for name in names])), "rows"
    with _undisturbed():
        hashes = dataset_hashes(dataset)
        rows_hashed = isinstance(dataset[0], Mapping)
    if hashes is None:
        return table.with_columns(pl.lit(None, dtype=pl.String).alias(CONTENT)), None
    return table.with_columns(pl.Series(CONTENT, hashes)), "rows" if rows_hashed else "items"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    # data sets draw from NumPy's global state, too
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with isolated_rng(torch.device("cpu")):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
