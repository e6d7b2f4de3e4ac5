"""Columns for the page: typed arrays and JSON behind one another, deflated, in base64."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

_TYPES = {"float32": "f4", "int32": "i4", "uint32": "u4", "uint16": "u2", "uint8": "u1"}


@dataclass(frozen=True)
class Budget:
    """How much of each kind the page may hold, in bytes unless said otherwise.

    Attributes:
        texts: deflated, of the short texts of all rows.
        long_texts: deflated, of the texts at length of the rows at both ends.
        columns: of categories and numbers.
        pixels: of thumbnails made of tensors.
        files: of encoded thumbnails.
        queries: of the estimates of all queries.
        visits: number of signals, over all queries.
    """

    texts: int = 1_000_000
    long_texts: int = 600_000
    columns: int = 1_000_000
    pixels: int = 900_000
    files: int = 500_000
    queries: int = 1_000_000
    visits: int = 60_000

    def scaled(self, factor: float) -> Budget:
        """Return the same budget with a part of everything."""
        return Budget(**{name: int(value * factor) for name, value in asdict(self).items()})


class Payload:
    """What the page's script reads: named arrays and JSON values.

    The layout is a uint32 length, a JSON index of that many bytes, and the arrays, each at a multiple of four bytes.
    Numbers of more than one byte are stored plane by plane (all first bytes, all second bytes, …), which deflate
    compresses better.
    """

    def __init__(self) -> None:
        self._index: dict[str, dict[str, Any]] = {}
        self._blocks: list[bytes] = []
        self._length = 0

    def array(self, name: str, values: ArrayLike, kind: str) -> None:
        """Add an array.

        Args:
            name: how the page asks for it.
            values: numbers of any shape, stored flat.
            kind: "float32", "int32", "uint32", "uint16" or "uint8".
        """
        flat = np.ascontiguousarray(np.asarray(values).ravel(), dtype=np.dtype(_TYPES[kind]).newbyteorder("<"))
        planes = flat.view(np.uint8).reshape(flat.size, flat.itemsize).T
        self._add(name, {"type": kind, "count": int(flat.size)}, planes.tobytes())

    def json(self, name: str, value: Any) -> None:
        """Add a JSON value; numbers that JSON lacks become null."""
        text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
        self.raw(name, text.encode("utf-8", "replace"), kind="json")

    def raw(self, name: str, data: bytes, *, kind: str = "bytes") -> None:
        """Add bytes as they are."""
        self._add(name, {"type": kind, "count": len(data)}, data)

    def encode(self) -> str:
        """Return everything as base64 text."""
        index = json.dumps(self._index, separators=(",", ":")).encode()
        index += b" " * (-len(index) % 4)
        packed = len(index).to_bytes(4, "little") + index + b"".join(self._blocks)
        return base64.b64encode(zlib.compress(packed, 7)).decode("ascii")

    def _add(self, name: str, entry: dict[str, Any], data: bytes) -> None:
        self._index[name] = entry | {"at": self._length}
        padded = data + bytes(-len(data) % 4)
        self._blocks.append(padded)
        self._length += len(padded)


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def floats(values: pl.Series) -> NDArray[np.float64]:
    """A numeric column with NaN where a value is missing."""
    return values.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def display_decimals(se: pl.Series) -> int:
    """Decimals with which μ is shown: two, as `score` prints, and more where the standard errors are finer."""
    known = se.drop_nulls().to_numpy()
    known = known[np.isfinite(known) & (known > 0)]
    if not known.size:
        return 2
    return int(np.clip(np.ceil(-np.log10(np.median(known))), 2, 5))


def units(values: ArrayLike, decimals: int) -> NDArray[np.int32]:
    """Numbers as they are displayed: integers in units of the last decimal.

    Args:
        values: (k,) numbers; NaN becomes the smallest int32, and −0 (a negative number that rounds to 0) the next.
        decimals: digits behind the point.

    Returns:
        (k,) the digits that `format(value, f".{decimals}f")` prints.
    """
    exact = np.asarray(values, dtype=np.float64)
    known = np.isfinite(exact)
    scaled = np.where(known, exact, 0.0) * 10.0**decimals
    found = np.rint(scaled)
    for place in np.flatnonzero(_near_tie(scaled)):
        found[place] = _digits(float(exact[place]), decimals)
    limits = np.iinfo(np.int32)
    found = np.clip(found, limits.min + 2, limits.max)
    found = np.where((found == 0) & (exact < 0), limits.min + 1, found)
    return np.where(known, found, limits.min).astype(np.int32)


def single(values: ArrayLike, decimals: int) -> NDArray[np.float32]:
    """Numbers in single precision that print the same digits as in double precision.

    Args:
        values: (k,) numbers.
        decimals: digits behind the point with which they are displayed.

    Returns:
        (k,) the nearest float32, or its neighbour where the nearest lies across a rounding border.
    """
    exact = np.asarray(values, dtype=np.float64)
    near = exact.astype(np.float32)
    scaled = np.where(np.isfinite(exact), exact, 0.0) * 10.0**decimals
    for place in np.flatnonzero(_near_tie(scaled)):
        wanted = _digits(float(exact[place]), decimals)
        for towards in (-np.inf, np.inf):
            neighbour = np.nextafter(near[place], np.float32(towards))
            if _prints(float(near[place]), decimals) != wanted and _prints(float(neighbour), decimals) == wanted:
                near[place] = neighbour
    return near


def _near_tie(scaled: NDArray[np.float64]) -> NDArray[np.bool_]:
    # generous against the relative error of float32, 6e-8, on figures of up to a hundred thousand last decimals
    return np.abs(np.abs(scaled - np.trunc(scaled)) - 0.5) < 1e-6 * np.maximum(np.abs(scaled), 1.0)


def _digits(value: float, decimals: int) -> int:
    return round(float(f"{value:.{decimals}f}") * 10**decimals)


def _prints(value: float, decimals: int) -> int | None:
    # None on an exact tie, which the browser rounds up and Python to even
    doubled = value * 2 * 10**decimals
    if doubled == round(doubled) and round(doubled) % 2:
        return None
    return _digits(value, decimals)
