"""The rows of a trainer's dataset: what they are called, what is said about them, what a batch of them holds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from finfluence.errors import InputError, RecordingError
from finfluence.runs.sources import first_repeat

_SCALARS = (pl.String, pl.Boolean, pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.Float32, pl.Float64)
_AGREE = 0.5  # masked language modelling replaces 15 % of a row's tokens


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A block after which the random states of Python, NumPy and torch are what they were before it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def is_table(dataset: Any) -> bool:
    """Whether rows may be read any number of times with the same result: an Arrow dataset, or a plain sequence."""
    if isinstance(dataset, (list, tuple)):
        return True
    return hasattr(dataset, "column_names") and (getattr(dataset, "format", None) or {}).get("type") != "custom"


def row_ids(dataset: Any, id_column: str | None, ids: Sequence[Any] | None, n: int) -> np.ndarray:
    """(n,) the name of every row, int64 or str.

    Args:
        dataset: the trainer's dataset, with the id column still in it.
        id_column: where the names stand; None for the row's index.
        ids: the names themselves, in the dataset's order.
        n: number of rows.

    Raises:
        InputError: no such column, a missing or repeated id, ids of another type, or of another number than n.
    """
    if ids is not None and id_column is not None:
        raise InputError("both ids and id_column were given; give one of them")
    if ids is None and id_column is None:
        return np.arange(n, dtype=np.int64)
    source = f"column {id_column!r}" if ids is None else "ids"
    values = list(_column(dataset, str(id_column))) if ids is None else list(ids)
    if len(values) != n:
        raise InputError(f"{source} has {len(values)} entries for a training set of {n} rows; give one a row")
    values = [v.item() if isinstance(v, (np.generic, Tensor)) else v for v in values]
    missing = [i for i, v in enumerate(values) if v is None or v == "" or (isinstance(v, float) and np.isnan(v))]
    if missing:
        raise InputError(
            f"{source} has no id in {len(missing)} of {n} rows, the first is row {missing[0]}; fill them, or name rows "
            "by their index (no id_column)"
        )
    kinds = {type(v) for v in values}
    if kinds not in ({int}, {str}):
        shown = ", ".join(sorted(k.__name__ for k in kinds))
        raise InputError(f"{source} holds {shown}; ids must all be integers, or all be strings")
    if (repeat := first_repeat(values)) is not None:
        raise InputError(
            f"{source} names rows {repeat[0]} and {repeat[1]} both {values[repeat[0]]!r}; make ids unique, or name "
            "rows by their index (no id_column)"
        )
    return np.asarray(values, dtype=np.int64 if kinds == {int} else None)


def sample_table(
    dataset: Any, ids: np.ndarray, samples: pl.DataFrame | None, *, id_column: str | None = None
) -> pl.DataFrame:
    """The table of samples: the caller's, or the dataset's columns of single values, one row an id.

    Raises:
        InputError: the caller's table lacks the column "sample", or does not hold the ids.
    """
    if samples is None:
        frame = pl.DataFrame({"sample": ids})
        for name in getattr(dataset, "column_names", ()) if is_table(dataset) else ():
            feature = getattr(dataset, "features", {}).get(name)
            if name in ("sample", id_column) or getattr(feature, "dtype", None) in (None, "list", "struct"):
                continue
            column = pl.Series(name, list(dataset[name]), strict=False)
            if column.dtype in _SCALARS:
                frame = frame.with_columns(column)
        return frame
    if "sample" not in samples.columns:
        raise InputError(f'samples has columns {samples.columns} and no "sample"; add the rows\' ids under that name')
    known = set(samples["sample"].to_list())
    unknown = [i for i in ids.tolist() if i not in known]
    if unknown:
        raise InputError(
            f"{len(unknown)} rows of the training set are not in samples, the first is {unknown[0]!r}; "
            f"samples names {samples['sample'].head(3).to_list()}…"
        )
    return samples


def in_order(samples: pl.DataFrame, ids: np.ndarray) -> pl.DataFrame:
    """The rows of a table of samples that a dataset has, in the dataset's order."""
    return pl.DataFrame({"sample": ids}).join(samples, on="sample", how="left", maintain_order="left")


def tokens_of(dataset: Any, row: int) -> list[int] | None:
    """The tokens of one row as the dataset holds them; None where it holds none or must not be read."""
    if not is_table(dataset):
        return None
    item = dataset[int(row)]
    tokens = item.get("input_ids") if isinstance(item, Mapping) else None
    if isinstance(tokens, Tensor | np.ndarray):
        tokens = tokens.tolist()
    return tokens if isinstance(tokens, list) and tokens and isinstance(tokens[0], int) else None


def check_tokens(batch: Tensor, rows: Sequence[int], tokens: Sequence[list[int]], *, step: int) -> None:
    """Raise unless each row of a padded batch holds the tokens of the dataset's row that it is taken for.

    Args:
        batch: (b, t) tokens.
        rows: (b,) rows of the dataset.
        tokens: (b,) their tokens.
        step: for the message.
    """
    for i, (values, mine) in enumerate(zip(batch.tolist(), tokens, strict=True)):
        if _agreement(values, mine) < _AGREE:
            raise RecordingError(
                f"row {i} of the batch at step {step} does not hold the tokens of row {rows[i]} of the training set, "
                "which the sampler asked for; if the collator rewrites or reorders rows on purpose, "
                'pass check="count" (reordered rows cannot be followed)'
            )


def _agreement(values: list[int], mine: list[int]) -> float:
    n = min(len(values), len(mine))
    heads = sum(a == b for a, b in zip(values[:n], mine[:n], strict=True))
    tails = sum(a == b for a, b in zip(values[-n:], mine[-n:], strict=True))
    return max(heads, tails) / n


def _column(dataset: Any, name: str) -> Any:
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if name not in columns:
            raise InputError(f"the training set has no column {name!r}; it has {', '.join(columns)}")
        return dataset[name]
    with undisturbed():
        found = []
        for i in range(len(dataset)):
            item = dataset[i]
            if not isinstance(item, Mapping):
                raise InputError(
                    f"rows of the training set are {type(item).__name__}, which has no column {name!r}; pass ids="
                )
            found.append(item.get(name))
    if all(value is None for value in found):
        raise InputError(f"the training set has no column {name!r}; pass ids= or leave id_column out")
    return found
