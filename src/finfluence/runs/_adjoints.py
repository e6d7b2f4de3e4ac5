"""The adjoint table of a replayed run: how each query's adjoint grew, and whether the signal identity held."""

from __future__ import annotations

import io
from collections.abc import Sequence

import polars as pl

from finfluence.signals import Folder

_TABLE = "adjoint"
_SCHEMA = {"step": pl.Int64, "query": pl.String, "norm": pl.Float64, "residual": pl.Float64}


def write_adjoints(
    folder: Folder,
    name: str,
    rows: Sequence[tuple[int, Sequence[float], Sequence[float]]],
    *,
    queries: Sequence[str],
) -> None:
    """Writes one part.

    Args:
        folder: the run directory.
        name: of the part.
        rows: step, norms and residuals of each query.
        queries: their names.
    """
    flat = [(step, *own) for step, *both in rows for own in zip(queries, *both, strict=True)]
    sink = io.BytesIO()
    pl.DataFrame(flat, schema=_SCHEMA, orient="row").write_parquet(sink)
    folder.write(f"{_TABLE}/part-{name}.parquet", sink.getvalue())


def read_adjoints(folder: Folder) -> pl.DataFrame:
    """The whole table.

    Args:
        folder: the run directory.

    Returns:
        step, query, norm of its adjoint before the step (0 from where it diverged), relative residual of the signal
        identity; ordered by step, empty where no replay has finished a segment.
    """
    parts = [pl.read_parquet(io.BytesIO(folder.read(f"{_TABLE}/{name}"))) for name in _parts(folder)]
    return pl.concat([pl.DataFrame(schema=_SCHEMA), *parts]).sort("step", maintain_order=True)


def clear_adjoints(folder: Folder) -> None:
    """Deletes the table."""
    for name in _parts(folder):
        folder.remove(f"{_TABLE}/{name}")


def _parts(folder: Folder) -> list[str]:
    return [name for name in folder.names(_TABLE) if name.startswith("part-")]
