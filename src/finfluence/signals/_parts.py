"""Parts: the Parquet files of a table, encoded, named, checked and read back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from finfluence.errors import InputError, StoreError
from finfluence.signals._files import Folder
from finfluence.signals._schema import Table

# Rows per row group: several a part, so that a reader's threads share a part and a step range can be skipped.
ROW_GROUP = 1 << 18

_NAME = re.compile(r"part-(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\.parquet")
_NUMBER = re.compile(r"\d{8}")


@dataclass(frozen=True)
class RowGroup:
    """Rows of a part that are read together: how many, and the least and greatest step among them."""

    rows: int
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """One Parquet file of a table, as its footer describes it."""

    table: Table
    name: str
    groups: tuple[RowGroup, ...]

    @property
    def file(self) -> str:
        """The file's name relative to the run directory."""
        return part_file(self.table, self.name)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(group.rows for group in self.groups)

    @property
    def first(self) -> int:
        """Least step; 0 in an empty part."""
        return min((group.first for group in self.groups), default=0)

    @property
    def last(self) -> int:
        """Greatest step; -1 in an empty part."""
        return max((group.last for group in self.groups), default=-1)


def part_file(table: str, name: str) -> str:
    """Return a part's file name relative to the run directory."""
    return f"{table}/part-{name}.parquet"


def numbered(number: int) -> str:
    """Return the part name of the flush with this number."""
    return f"{number:08d}"


def part_number(name: str) -> int:
    """Return the flush number in a part's name, or -1 for a part that its caller named."""
    return int(name) if _NUMBER.fullmatch(name) else -1


def check_part_name(name: str) -> None:
    """Raise InputError when a caller's part name is not a file name, or could be that of a flush."""
    if not _NAME.fullmatch(part_file("", name)[1:]):
        raise InputError(f"part name {name!r} is not made of letters, digits, '.', '_' and '-'")
    if name.isdigit():
        raise InputError(f"part name {name!r} is all digits, which flushes use; add a letter, e.g. 'segment-{name}'")


def part_names(folder: Folder, table: Table) -> list[str]:
    """List the names of a table's parts, leaving out what interrupted writes left behind."""
    matches = (_NAME.fullmatch(base) for base in folder.names(table))
    return [match["name"] for match in matches if match]


def encode_part(rows: pa.Table) -> memoryview:
    """Return the Parquet bytes of a part.

    The step is a dictionary (runs of one value), integer identifiers are bit-packed differences (17 bits a row for a
    permutation of 50,000), signals are plain; the three decode at memory speed under zstd's lightest level.
    """
    packed = [f.name for f in rows.schema if f.name == "sample" and pa.types.is_integer(f.type)]
    plain = [f.name for f in rows.schema if pa.types.is_floating(f.type) or pa.types.is_boolean(f.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in rows.column_names if name not in packed and name not in plain],  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED") | dict.fromkeys(plain, "PLAIN"),
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def inspect_part(folder: Folder, table: Table, name: str, schema: pa.Schema) -> Part:
    """Read a part's footer and check that the part belongs to the run.

    Raises:
        StoreError: the file is truncated, is no Parquet file, or has other columns.
    """
    file = part_file(table, name)
    path = folder.path(file)
    with reading(path):
        opened = pq.ParquetFile(folder.source(file))
        with opened:
            check_columns(path, opened.schema_arrow, schema)
            metadata = opened.metadata
            column = metadata.schema.names.index("step")
            groups = []
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                if group.num_rows == 0:
                    continue
                statistics = group.column(column).statistics
                if statistics is not None and statistics.has_min_max:
                    first, last = statistics.min, statistics.max
                else:
                    step = opened.read_row_group(index, columns=["step"])["step"].to_numpy()
                    first, last = step.min(), step.max()
                groups.append(RowGroup(group.num_rows, int(first), int(last)))
    return Part(table, name, tuple(groups))


def check_columns(path: str, found: pa.Schema, expected: pa.Schema) -> None:
    """Raise StoreError when a file's columns are not those of the run's table."""
    if found.names != expected.names:
        raise StoreError(
            f"{path} has columns {', '.join(found.names[:8])}, this run's are {', '.join(expected.names[:8])}; "
            "the file belongs to another run, remove it"
        )
    for field in expected:
        seen = found.field(field.name).type
        if seen == pa.large_string():
            seen = pa.string()
        if seen != field.type:
            raise StoreError(f"{path} holds {field.name!r} as {seen}, this run as {field.type}; remove the file")


def read_part(folder: Folder, part: Part, columns: Sequence[str], *, groups: Sequence[int] | None = None) -> pa.Table:
    """Read columns of a part, or of some of its row groups; string identifiers come as dictionaries.

    Raises:
        StoreError: the file is damaged; pages are compared with their checksums.
    """
    strings = ["sample"] if "sample" in columns else None
    with reading(folder.path(part.file)):
        source = folder.source(part.file)
        opened = pq.ParquetFile(source, read_dictionary=strings, page_checksum_verification=True)
        with opened:
            if groups is None:
                return opened.read(columns=list(columns))
            return opened.read_row_groups(list(groups), columns=list(columns))


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what pyarrow raises while it reads `path` into a StoreError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise StoreError(
            f"{path} is not a readable Parquet file ({reason}); it is truncated, damaged or foreign: "
            "restore it from a copy or remove it"
        ) from error
