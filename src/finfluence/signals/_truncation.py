"""Rewriting a run's parts: what a killed flush left behind is dropped, and steps that will be recorded again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from finfluence.signals._files import Folder
from finfluence.signals._parts import Part, encode_part, inspect_part, part_names, read_part
from finfluence.signals._schema import COMMIT_ORDER, ROW_TABLES, Table

Schemas = Mapping[Table, pa.Schema]


def inspect_table(folder: Folder, table: Table, schema: pa.Schema) -> list[Part]:
    """Read the footers of a table's parts, in the order of their steps."""
    found = [inspect_part(folder, table, name, schema) for name in part_names(folder, table)]
    return sorted(found, key=lambda part: (part.first, part.last, part.name))


def recorded_steps(folder: Folder, steps: list[Part]) -> npt.NDArray[np.int64]:
    """Return the steps that have a row in `steps`, sorted: (n_steps,) int64."""
    columns = [read_part(folder, part, ["step"])["step"].to_numpy() for part in steps]
    return np.sort(np.concatenate(columns)) if columns else np.empty(0, dtype=np.int64)


def is_recorded(steps: npt.NDArray[np.int64], first: int, last: int) -> bool:
    """Tell whether every step number from `first` to `last` is among the sorted `steps`."""
    low, high = np.searchsorted(steps, [first, last + 1])
    return bool(high - low == last - first + 1)


def recover(folder: Folder, schemas: Schemas) -> npt.NDArray[np.int64]:
    """Drop what an interrupted writer left: temporary files, and signals of steps that have no row in `steps`.

    Returns:
        The steps that have a row in `steps`, sorted: (n_steps,) int64.
    """
    folder.clean()
    for table in COMMIT_ORDER:
        folder.clean(table)
    steps = recorded_steps(folder, inspect_table(folder, "steps", schemas["steps"]))
    allowed = pa.array(steps)
    for table in ROW_TABLES:
        for part in inspect_table(folder, table, schemas[table]):
            if not is_recorded(steps, part.first, part.last):
                _keep(folder, part, schemas[table], pc.field("step").isin(allowed))
    return steps


def truncate(folder: Folder, schemas: Schemas, step: int) -> None:
    """Drop the rows of `step` and later from every table.

    `steps` goes first and from its end: a step without its row does not count, so that a process killed on the way
    leaves a shorter run, and never a step with half of its signals.
    """
    for table in reversed(COMMIT_ORDER):
        for part in reversed(inspect_table(folder, table, schemas[table])):
            if part.last >= step:
                _keep(folder, part, schemas[table], pc.field("step") < step)


def _keep(folder: Folder, part: Part, schema: pa.Schema, condition: pc.Expression) -> None:
    rows = read_part(folder, part, schema.names).filter(condition)
    if rows.num_rows:
        folder.write(part.file, encode_part(rows.cast(schema)))
    else:
        folder.remove(part.file)
