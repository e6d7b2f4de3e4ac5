"""The file that training data came from: its rows, their content hashes, and any choice of them in the file's own form.

Rows of JSON-lines and CSV files keep their bytes, so that a chosen part of a file is written back exactly as it was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finfluence.errors import InputError

CONTENT = "content_hash"  # column of the sample table

SourceFormat = Literal["jsonl", "csv", "parquet"]
FORMATS: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}

_DELIMITERS = ",;\t|"
_BOM = b"\xef\xbb\xbf"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Source:
    """Where the rows of a training set came from, as `run.json` keeps it.

    Attributes:
        path: of the file.
        format: "jsonl", "csv" or "parquet".
        id_column: the column that names samples; None where a sample is named by its row's index.
    """

    path: str
    format: SourceFormat
    id_column: str | None = None

    def __post_init__(self) -> None:
        if self.format not in get_args(SourceFormat):
            raise InputError(f"the source {self.path} has format {self.format!r}; choose jsonl, csv or parquet")

    @classmethod
    def of(cls, path: str | Path, *, id_column: str | None = None) -> Source:
        """The source that a file is, by its suffix."""
        return cls(str(path), source_format(path), id_column)

    def as_dict(self) -> dict[str, Any]:
        """The entry "source" of run.json."""
        return {"path": self.path, "format": self.format, "id_column": self.id_column}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Source:
        """Reads the entry of run.json back.

        Raises:
            InputError: an entry without path or with an unknown format.
        """
        try:
            return cls(str(entry["path"]), entry["format"], entry.get("id_column"))
        except KeyError as error:
            raise InputError(f"the source {dict(entry)} has no {error}; give path, format and id_column") from None


@dataclass(frozen=True, eq=False)
class SourceRows:
    """The rows of a file, in its order.

    Attributes:
        path: of the file.
        format: of the file.
        columns: names, in the order in which they first appear.
        rows: one mapping a row; CSV values are strings.
        raw: each row's bytes with its line end (JSON lines and CSV), or the table itself (Parquet).
        head: what stands before the first row: a byte-order mark, the header line.
        delimiter: of a CSV file.
    """

    path: str
    format: SourceFormat
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    raw: Any = field(repr=False)
    head: bytes = field(default=b"", repr=False)
    delimiter: str = ","

    @property
    def end(self) -> str:
        """The line end of a text file."""
        return "\r\n" if self.format != "parquet" and self.raw and self.raw[0].endswith(b"\r\n") else "\n"

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, id_column: str | None) -> list[Any]:
        """The samples' names: a column's values, or the rows' indices where there is no such column.

        Raises:
            InputError: an unknown column.
        """
        if id_column is None:
            return list(range(len(self.rows)))
        if id_column not in self.columns:
            raise InputError(f"{self.path} has no column {id_column!r} (columns: {', '.join(self.columns)})")
        return [row.get(id_column) for row in self.rows]

    def hashes(self) -> list[str]:
        """(n,) content hash of every row."""
        return [row_hash(row) for row in self.rows]

    def part(self, positions: Sequence[int]) -> bytes:
        """A file of the same format with the chosen rows as they stand in this one.

        Args:
            positions: (k,) rows to keep, in the order to write.
        """
        if self.format == "parquet":
            sink = io.BytesIO()
            pq.write_table(self.raw.take(pa.array(positions, type=pa.int64())), sink)
            return sink.getvalue()
        end = self.end.encode()
        lines = [self.raw[i] for i in positions]
        body = b"".join(line if line.endswith((b"\n", b"\r")) else line + end for line in lines)
        open_ended = bool(self.raw) and not self.raw[-1].endswith((b"\n", b"\r"))
        if open_ended and body:
            # the file did not end its last line, so neither does a part of it
            body = body.removesuffix(b"\n").removesuffix(b"\r")
        return self.head + body


def source_format(path: str | Path) -> SourceFormat:
    """The format that a file's suffix names.

    Raises:
        InputError: another suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{path} ends in {suffix or 'no suffix'}; use one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def read_source(path: str | Path) -> SourceRows:
    """Reads a JSON-lines, CSV or Parquet file.

    Args:
        path: a local file; its suffix names the format. Text is UTF-8.

    Raises:
        InputError: the file is missing, empty or not what its suffix says; the first bad line is named.
    """
    kind = source_format(path)
    try:
        if kind == "parquet":
            table = pq.read_table(path)
            return SourceRows(str(path), kind, tuple(table.column_names), table.to_pylist(), table)
        content = Path(path).read_bytes()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from None
    found = _read_json_lines(str(path), content) if kind == "jsonl" else _read_csv(str(path), content)
    if not found.rows:
        raise InputError(f"{path} holds no rows")
    return found


def _read_json_lines(path: str, content: bytes) -> SourceRows:
    head = _BOM if content.startswith(_BOM) else b""
    rows: list[dict[str, Any]] = []
    raw: list[bytes] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(content[len(head) :].split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is a JSON {type(row).__name__}; every line must be an object")
        rows.append(row)
        raw.append(line + b"\n")
        columns |= dict.fromkeys(row)
    if raw and not content.endswith(b"\n"):
        raw[-1] = raw[-1].removesuffix(b"\n")
    return SourceRows(path, "jsonl", tuple(columns), rows, raw, head)


def _read_csv(path: str, content: bytes) -> SourceRows:
    mark = _BOM if content.startswith(_BOM) else b""
    lines = list(io.StringIO(content[len(mark) :].decode("utf-8"), newline=""))
    delimiter = _delimiter(lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    previous = csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    header: list[str] | None = None
    head = mark
    rows: list[dict[str, Any]] = []
    raw: list[bytes] = []
    start = 0
    try:
        for record in reader:
            text = "".join(lines[start : reader.line_num]).encode("utf-8")
            first, start = start + 1, reader.line_num
            if not record:
                continue
            if header is None:
                header, head = record, head + text
                if len(set(header)) < len(header):
                    raise InputError(f"{path} names a column twice in its header: {', '.join(header)}")
                continue
            if len(record) != len(header):
                raise InputError(f"{path}, line {first} has {len(record)} values, but the header has {len(header)}")
            rows.append(dict(zip(header, record, strict=True)))
            raw.append(text)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(previous)
    return SourceRows(path, "csv", tuple(header or ()), rows, raw, head, delimiter)


def _delimiter(lines: Sequence[str]) -> str:
    """The delimiter that cuts the header into the most columns; a comma where none does."""
    if not lines:
        return ","
    widths = {d: len(next(csv.reader([lines[0]], delimiter=d), [])) for d in _DELIMITERS}
    return max(_DELIMITERS, key=lambda d: widths[d])


def row_hash(row: Mapping[str, Any]) -> str:
    """The content hash of a row: 16 hexadecimal digits.

    It does not depend on the order of the keys, and reading one table from JSON, CSV or Parquet gives one hash: a value
    is hashed as the text that CSV would hold of it (1, 1.0 and "1" are one value; so are null, "" and a missing key).

    Args:
        row: names to values: numbers, texts, lists, mappings, arrays, tensors, bytes.

    Raises:
        InputError: a value that has no content of its own, such as an open file.
    """
    return _digest(_plain(row))


def item_hash(item: Any) -> str | None:
    """The content hash of any item of a dataset, `row_hash` where it is a mapping; None where it has none."""
    try:
        return _digest(_plain(item))
    except InputError:
        return None


def dataset_hashes(dataset: Any) -> list[str] | None:
    """(n,) content hashes of a dataset's items; None where items change when they are read again, or have no content.

    Random augmentation is such a change. Reading may draw random numbers: call it where their state is kept.
    """
    if item_hash(dataset[0]) is None or item_hash(dataset[0]) != item_hash(dataset[0]):
        return None
    hashes = [item_hash(dataset[i]) for i in range(len(dataset))]
    return None if None in hashes else [str(found) for found in hashes]


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """The value as nested lists and mappings of texts."""
    if isinstance(value, Mapping):
        parts = {str(key): _plain(part) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "detach"):  # a tensor; named by what it offers, because reading a run needs no PyTorch
        value = value.detach().cpu()
        value = (value if value.dtype.is_floating_point is False else value.double()).numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return _plain(value.item()) if value.ndim == 0 else ["array", list(value.shape), _of_bytes(value)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ["bytes", hashlib.blake2b(bytes(value), digest_size=8).hexdigest()]
    return _text(value)


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str):
        return _canonical(value)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image
        return f"image {value.size} {value.mode} {hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()}"
    raise InputError(f"a value of type {type(value).__name__} has no content hash; use numbers, texts, lists or arrays")


def _canonical(text: str) -> str:
    if text.lower() in ("true", "false"):
        return text.lower()
    if not text.isascii() or not _NUMBER.fullmatch(text):
        return text
    number = float(text)
    if not any(mark in text for mark in ".eE"):
        return str(int(text)) if len(text) < 4000 else text
    return (str(int(number)) if number.is_integer() else repr(number)) if math.isfinite(number) else text


def _of_bytes(array: np.ndarray) -> str:
    # one content, one hash, whichever precision of integers or floats it was stored in
    kind = "float64" if array.dtype.kind == "f" else "int64" if array.dtype.kind in "iub" else None
    if kind is None:
        return _digest([_plain(part) for part in array.ravel().tolist()])
    return hashlib.blake2b(np.ascontiguousarray(array, dtype=kind).tobytes(), digest_size=8).hexdigest()


__all__ = [
    "Source",
    "SourceFormat",
    "SourceRows",
    "dataset_hashes",
    "item_hash",
    "read_source",
    "row_hash",
    "source_format",
]


def first_repeat(names: Iterable[Hashable]) -> tuple[int, int] | None:
    """Places of the first name that occurs a second time: where it stood before, and where it stands again."""
    seen: dict[Hashable, int] = {}
    for place, name in enumerate(names):
        if name in seen:
            return seen[name], place
        seen[name] = place
    return None
