"""The tables of a run directory: their columns, their types and the checks of names and identifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from finfluence.errors import InputError

IdDtype = Literal["int64", "str"]
SignalTable = Literal["signals", "live", "panel", "self"]
Table = Literal["steps", "signals", "live", "panel", "self", "watch"]

# The order in which a flush writes its parts: steps come last, because a step's row is what makes its signals count.
SIGNAL_TABLES: tuple[SignalTable, ...] = get_args(SignalTable)
ROW_TABLES: tuple[Table, ...] = (*SIGNAL_TABLES, "watch")
COMMIT_ORDER: tuple[Table, ...] = (*ROW_TABLES, "steps")

ARMS = ("with", "without", "auxiliary")
SELF = "self"
RESERVED = ("step", "sample", "epoch", "position", "subset", "arm", SELF)

STEPS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("position", pa.int64()),
        ("learning_rate", pa.float64()),
        ("batch_size", pa.int64()),
        ("loss", pa.float64()),
        ("residual", pa.float64()),
        ("scale", pa.float64()),
        ("nonfinite", pa.bool_()),
        ("skipped", pa.bool_()),
    ]
)

STEPS_COLUMNS: tuple[str, ...] = tuple(STEPS_SCHEMA.names)

_SAMPLES = {
    "signals": ("step",),
    "live": ("step",),
    "panel": ("step", "epoch", "position"),
    "self": ("step",),
}


def check_queries(queries: Sequence[str]) -> tuple[str, ...]:
    """Return the query names as a tuple, or say which of them cannot be a column.

    Raises:
        InputError: no names, a name that is not a non-empty string, a repeated name, or a reserved column.
    """
    if isinstance(queries, str):
        raise InputError(f"queries must be a sequence of names, got the string {queries!r}; pass [{queries!r}]")
    names = tuple(queries)
    if not names:
        raise InputError("queries is empty; name at least one query")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"query name {name!r} is not a non-empty string; give every query a name")
        if name in RESERVED:
            raise InputError(f"query name {name!r} is a reserved column ({', '.join(RESERVED)}); choose another name")
        if name in seen:
            raise InputError(f"query name {name!r} is given twice; give every query its own name")
        seen.add(name)
    return names


def check_table(table: str) -> None:
    """Raise InputError when the table is not one of signals."""
    if table not in SIGNAL_TABLES:
        raise InputError(f"table {table!r} is not one of {', '.join(SIGNAL_TABLES)}")


def check_id_dtype(id_dtype: str) -> IdDtype:
    """Return the type of the sample identifiers, or raise InputError when it is neither int64 nor str."""
    if id_dtype not in get_args(IdDtype):
        raise InputError(f"id_dtype is {id_dtype!r}; use 'int64' or 'str'")
    return id_dtype  # pyright: ignore[reportReturnType]


def table_schema(table: Table, queries: Sequence[str], id_dtype: IdDtype) -> pa.Schema:
    """Return the Arrow schema of a table's parts."""
    if table == "steps":
        return STEPS_SCHEMA
    values = [(query, pa.float32()) for query in table_queries(table, queries)]
    if table == "watch":
        return pa.schema([("step", pa.int64()), ("subset", pa.string()), ("arm", pa.string()), *values])
    place = [(name, pa.int64()) for name in _SAMPLES[table]]
    sample = ("sample", pa.int64() if id_dtype == "int64" else pa.string())
    return pa.schema([*place, sample, *values])


def table_queries(table: Table, queries: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a table's value columns: the run's queries, or the sample itself in the table `self`."""
    return (SELF,) if table == "self" else tuple(queries)


def as_ids(samples: Any, id_dtype: IdDtype) -> npt.NDArray[Any] | list[str]:
    """Check a batch's sample identifiers and copy them.

    Args:
        samples: (b,) identifiers, integers or strings.
        id_dtype: the type that the run was created with.

    Returns:
        (b,) int64 array, or a list of b strings.

    Raises:
        InputError: identifiers of the other type, or not one-dimensional.
    """
    if id_dtype == "int64":
        array = np.asarray(samples)
        if array.ndim != 1:
            raise InputError(f"samples has shape {array.shape}; pass one identifier per row, shape (b,)")
        if array.dtype.kind not in "iu" and array.size:
            seen = array[0].item() if hasattr(array[0], "item") else array[0]
            raise InputError(f"sample identifier {seen!r} is not an integer; create the run with id_dtype='str'")
        return array.astype(np.int64)
    ids = samples.tolist() if hasattr(samples, "tolist") else list(samples)
    for identifier in ids:
        if not isinstance(identifier, str):
            raise InputError(f"sample identifier {identifier!r} is not a string; create the run with id_dtype='int64'")
    return ids


def as_values(values: Any, rows: int, queries: Sequence[str]) -> npt.NDArray[np.float32]:
    """Check a batch's signals and copy them.

    Args:
        values: (b, n_queries) signals; (b,) where there is one query.
        rows: b, the number of sample identifiers.
        queries: the run's queries.

    Returns:
        (b, n_queries) float32.

    Raises:
        InputError: another shape.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.array(values, dtype=np.float32)
    if array.ndim == 1 and len(queries) == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != len(queries):
        raise InputError(f"values has shape {array.shape}; pass (b, n_queries) = ({rows}, {len(queries)})")
    if array.shape[0] != rows:
        raise InputError(f"{rows} sample identifiers for {array.shape[0]} rows of values; pass one identifier per row")
    return array


def check_samples(frame: pl.DataFrame, id_dtype: IdDtype) -> pl.DataFrame:
    """Return the sample table with its identifiers in the run's type.

    Args:
        frame: a column `sample` of unique identifiers, and any further columns.
        id_dtype: the type that the run was created with.

    Raises:
        InputError: no column `sample`, identifiers missing, of the other type, or one that stands twice.
    """
    if "sample" not in frame.columns:
        raise InputError(f"the sample table has no column 'sample' (columns: {', '.join(frame.columns) or 'none'})")
    ids = frame["sample"]
    if id_dtype == "int64" and ids.dtype.is_integer():
        ids = ids.cast(pl.Int64)
    elif id_dtype == "str" and isinstance(ids.dtype, pl.Categorical | pl.Enum):
        ids = ids.cast(pl.String)
    expected = pl.Int64 if id_dtype == "int64" else pl.String
    if ids.dtype != expected:
        raise InputError(f"the sample table's identifiers are {ids.dtype}, the run's are {id_dtype}; convert them")
    if ids.null_count():
        raise InputError(f"the sample table has {ids.null_count()} rows without identifier; give every row its own")
    if ids.n_unique() != ids.len():
        twice = ids.filter(ids.is_duplicated())[0]
        raise InputError(f"sample identifier {twice!r} stands more than once in the sample table; make ids unique")
    return frame.with_columns(ids)


def as_int(name: str, value: Any) -> int:
    """Return an integer argument as int, or raise InputError naming it."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InputError(f"{name} is {value!r}; pass an integer")
    return int(value)


def _as_cell(name: str, value: Any) -> Any:
    if value is None:
        if name == "step":
            raise InputError("step is None; pass an integer")
        return None
    kind = STEPS_SCHEMA.field(name).type
    if pa.types.is_integer(kind):
        return as_int(name, value)
    try:
        return bool(value) if pa.types.is_boolean(kind) else float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"column {name!r} of a step is {value!r}; pass a number") from error


def as_step_row(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the `steps` table in its column types.

    Raises:
        InputError: a column too many or too few, or a value of another type.
    """
    for name in STEPS_SCHEMA.names:
        if name not in columns:
            raise InputError(f"the step's row lacks the column {name!r}; pass None where it is not known")
    for name in columns:
        if name not in STEPS_SCHEMA.names:
            raise InputError(f"the step's row has the column {name!r}; the columns are {', '.join(STEPS_SCHEMA.names)}")
    return {name: _as_cell(name, columns[name]) for name in STEPS_SCHEMA.names}


def conform(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return a caller's frame as an Arrow table of the schema; InputError when its columns do not fit."""
    if sorted(frame.columns) != sorted(schema.names):
        raise InputError(f"the part has columns {', '.join(frame.columns)}; pass {', '.join(schema.names)}")
    for name in frame.columns:
        if frame[name].null_count():
            raise InputError(f"column {name!r} of the part has {frame[name].null_count()} empty cells; fill them")
    try:
        return frame.select(schema.names).to_arrow().cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"the part's columns do not fit the run's ({str(error).splitlines()[0]})") from error
