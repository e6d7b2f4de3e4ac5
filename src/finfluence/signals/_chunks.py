"""The rows of a table of signals as NumPy arrays, chunk by chunk, with steps and samples as positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from finfluence.errors import StoreError
from finfluence.signals._parts import Part, read_part
from finfluence.signals._schema import SignalTable
from finfluence.signals._truncation import is_recorded
from finfluence.signals.store import SignalStore

# Small parts are joined up to the first number of rows, so that per-sample work is spread over many rows;
# a part above the second is cut at its row groups, so that memory stays bounded.
_JOIN_ROWS = 1 << 20
_CUT_ROWS = 1 << 23

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Rows that are processed together.

    Attributes:
        steps: (rows,) int64, position of each row's step among the recorded steps.
        codes: (rows,) int64, position of each row's sample in the sample table; empty when they were not asked for.
        values: (rows,) float32.
    """

    steps: IntArray
    codes: IntArray
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Piece:
    part: Part
    groups: tuple[int, ...]
    rows: int
    first: int
    last: int


class Chunks:
    """The rows of one query in one table.

    Args:
        store: the run.
        query: the query's name.
        table: "signals", "live", "panel" or "self".
    """

    def __init__(self, store: SignalStore, query: str, *, table: SignalTable) -> None:
        store.check_table(table)
        self._store = store
        self._query = store.check_query(query, table)
        self._table: SignalTable = table
        self._steps = store.step_numbers
        self._plan = _plan(store._parts[table], max(_JOIN_ROWS, store.samples().collect().height))

    @property
    def separate(self) -> bool:
        """Whether no step lies in two chunks, so that a chunk holds all rows of each of its steps."""
        last = None
        for chunk in self._plan:
            if last is not None and chunk[0].first <= last:
                return False
            last = max(piece.last for piece in chunk)
        return True

    def read(self, *, samples: bool = True) -> Iterator[Chunk]:
        """Yield the chunks in the order of their steps; the next one is read while the caller works on this one.

        Args:
            samples: read each row's sample.

        Raises:
            StoreError: a damaged part, or a sample that the sample table lacks.
        """
        encode = sample_encoder(self._store) if samples else None
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            for pieces in self._plan:
                current, ahead = ahead, pool.submit(self._load, pieces, encode)
                if current is not None:
                    yield current.result()
            if ahead is not None:
                yield ahead.result()

    def _load(self, pieces: list[_Piece], encode: Callable[[pa.ChunkedArray, str], IntArray] | None) -> Chunk:
        loaded = [self._load_piece(piece, encode) for piece in pieces]
        if len(loaded) == 1:
            return loaded[0]
        return Chunk(
            np.concatenate([chunk.steps for chunk in loaded]),
            np.concatenate([chunk.codes for chunk in loaded]),
            np.concatenate([chunk.values for chunk in loaded]),
        )

    def _load_piece(self, piece: _Piece, encode: Callable[[pa.ChunkedArray, str], IntArray] | None) -> Chunk:
        columns = ["step", "sample", self._query] if encode else ["step", self._query]
        rows = read_part(self._store._folder, piece.part, columns, groups=piece.groups)
        if not is_recorded(self._steps, piece.first, piece.last):
            rows = rows.filter(pc.field("step").isin(pa.array(self._steps)))
        codes = encode(rows["sample"], piece.part.file) if encode else np.empty(0, dtype=np.int64)
        return Chunk(self._positions(rows["step"].to_numpy()), codes, rows[self._query].to_numpy())

    def _positions(self, steps: IntArray) -> IntArray:
        first = int(self._steps[0]) if self._steps.size else 0
        if self._steps.size and self._steps[-1] - first + 1 == self._steps.size:
            return steps - first
        return np.searchsorted(self._steps, steps)


def sample_encoder(store: SignalStore) -> Callable[[pa.ChunkedArray, str], IntArray]:
    """Return a function from a column of identifiers to their positions in the sample table.

    The function's second argument is the file that a StoreError names when the sample table lacks an identifier.
    """
    ids = store.samples().select("sample").collect()["sample"]
    known = ids.to_arrow()
    table: IntArray | None = None
    offset = 0
    if store.id_dtype == "int64" and ids.len():
        numbers = ids.to_numpy()
        offset = int(numbers.min())
        span = int(numbers.max()) - offset + 1
        # Identifiers that lie close together, as positions in a data set do, need no hashing.
        if span <= 8 * ids.len() + (1 << 20):
            table = np.full(span, -1, dtype=np.int64)
            table[numbers - offset] = np.arange(ids.len())
    if store.id_dtype == "str":
        known = known.cast(pa.string())

    def lookup(column: pa.Array | pa.ChunkedArray) -> IntArray:
        found = pc.call_function("index_in", [column], pc.SetLookupOptions(value_set=known))
        return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def encode(column: pa.ChunkedArray, file: str) -> IntArray:
        if table is not None:
            shifted = column.to_numpy() - offset
            inside = bool(shifted.size == 0 or (shifted.min() >= 0 and shifted.max() < table.size))
            codes = table[shifted] if inside else lookup(column)
        elif pa.types.is_dictionary(column.type):
            chunks = [lookup(chunk.dictionary)[chunk.indices.to_numpy()] for chunk in column.chunks]
            codes = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)
        else:
            codes = lookup(column)
        if codes.size and codes.min() < 0:
            stranger = column[int(np.argmin(codes))].as_py()
            raise StoreError(
                f"{store._folder.path(file)} has signals of sample {stranger!r}, which samples.parquet lacks; "
                "write the complete sample table with SignalWriter.write_samples"
            )
        return codes

    return encode


def _plan(parts: list[Part], join_rows: int) -> list[list[_Piece]]:
    plan: list[list[_Piece]] = []
    rows = join_rows
    for part in parts:
        if part.rows == 0:
            continue
        whole = _Piece(part, tuple(range(len(part.groups))), part.rows, part.first, part.last)
        for piece in _cut(part, join_rows) if part.rows > _CUT_ROWS else [whole]:
            if rows + piece.rows > join_rows:
                plan.append([])
                rows = 0
            plan[-1].append(piece)
            rows += piece.rows
    return plan


def _cut(part: Part, rows: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    start, size = 0, 0
    for index, group in enumerate(part.groups):
        size += group.rows
        if size >= rows or index == len(part.groups) - 1:
            span = part.groups[start : index + 1]
            first, last = min(g.first for g in span), max(g.last for g in span)
            pieces.append(_Piece(part, tuple(range(start, index + 1)), size, first, last))
            start, size = index + 1, 0
    return pieces
