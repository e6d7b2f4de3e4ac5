"""Subsets named by sample ids, packed for vectorised queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats, Ints

Ids = pl.Series | NDArray[Any] | Sequence[Any]
Subsets = Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class PackedSubsets:
    """Several subsets as one array of sample codes.

    Attributes:
        names: one name a subset.
        codes: (Σ sizes,) sample codes, subset after subset.
        offsets: (n_subsets,) where each subset starts in `codes`.
        sizes: (n_subsets,) number of samples of each.
    """

    names: list[Any]
    codes: Ints
    offsets: Ints
    sizes: Ints

    def sums(self, values: Floats) -> Floats:
        """Sum per-sample values, (n,), over each subset, (n_subsets,)."""
        return np.add.reduceat(values[self.codes], self.offsets)

    def codes_of(self, row: int) -> Ints:
        """Return the sample codes of one subset."""
        return self.codes[self.offsets[row] : self.offsets[row] + self.sizes[row]]


class SampleIndex:
    """The ids of a run's samples in the order of their codes, and the way from ids to codes.

    Args:
        ids: (n,) unique int64 or str ids; sample code c is row c. A number n means the ids 0 … n − 1.

    Raises:
        InputError: duplicate ids, or ids that are neither integers nor strings.
    """

    def __init__(self, ids: Ids | int) -> None:
        series = pl.Series("sample", np.arange(ids) if isinstance(ids, int) else ids)
        if not (series.dtype.is_integer() or series.dtype == pl.String):
            raise InputError(f"sample ids have dtype {series.dtype}; use integers or strings")
        if series.null_count():
            raise InputError(f"{series.null_count()} sample ids are null; give every sample an id")
        self.ids: pl.Series = series if series.dtype == pl.String else series.cast(pl.Int64)
        if self.ids.n_unique() != len(self.ids):
            first = self.ids.filter(self.ids.is_duplicated())[0]
            raise InputError(f"sample id {first!r} occurs more than once; ids must be unique")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _table(self) -> tuple[int, Ints] | None:
        """Lowest id and the code, or −1, of every id from there on, where the ids span a narrow range."""
        if self.ids.dtype == pl.String:
            return None
        ids = self.ids.to_numpy()
        low, high = int(ids.min()), int(ids.max())
        if high - low > 16 * len(ids) + 65536:
            return None
        table = np.full(high - low + 1, -1, dtype=np.int64)
        table[ids - low] = np.arange(len(ids))
        return low, table

    def codes(self, ids: Ids) -> Ints:
        """Map ids, (k,), to codes, (k,).

        Raises:
            InputError: an id that the run does not have (the first is named), or ids of another type than the run's.
        """
        strings = self.ids.dtype == pl.String
        try:
            wanted: pl.Series = (
                ids if isinstance(ids, pl.Series) else pl.Series(_strings(ids) if strings else np.asarray(ids))
            )
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
            raise InputError("sample ids are of mixed or unknown types; pass a flat sequence of ids") from None
        if len(wanted) and (wanted.dtype != pl.String if strings else not wanted.dtype.is_integer()):
            kind = "strings" if strings else "integers"
            raise InputError(f"sample id {wanted[0]!r} has type {wanted.dtype}; the run's ids are {kind}")
        if not len(wanted):
            return np.empty(0, dtype=np.int64)
        if not strings and self._table is not None:
            low, table = self._table
            numbers = wanted.cast(pl.Int64).to_numpy()
            inside = (numbers >= low) & (numbers < low + len(table))
            codes = np.where(inside, table[np.where(inside, numbers - low, 0)], -1)
        else:
            right = pl.DataFrame({"id": self.ids, "code": np.arange(len(self))})
            left = pl.DataFrame({"id": wanted if strings else wanted.cast(pl.Int64)})
            joined = left.join(right, on="id", how="left", maintain_order="left")
            codes = joined["code"].fill_null(-1).to_numpy()
        if codes.min() < 0:
            missing = wanted[int(np.argmin(codes >= 0))]
            unknown = int((codes < 0).sum())
            raise InputError(
                f"sample id {missing!r} is not in the run ({unknown} unknown in all); "
                f"its {len(self)} samples start with {self.ids[0]!r}"
            )
        return codes

    def pack(self, subsets: Subsets) -> PackedSubsets:
        """Map named subsets (or a sequence, named by its own index) to packed codes.

        Raises:
            InputError: no subsets, an empty or the whole set, an unknown id, or an id twice in one subset.
        """
        if isinstance(subsets, Mapping):
            names, members = list(subsets.keys()), list(subsets.values())
        else:
            members = list(subsets)
            names = list(range(len(members)))
        if not members:
            raise InputError("no subsets were given; pass a mapping of names to sample ids")
        arrays = [_flat(member, name) for name, member in zip(names, members, strict=True)]
        sizes = np.array([len(array) for array in arrays], dtype=np.int64)
        if not sizes.all():
            raise InputError(f"subset {names[int(np.argmin(sizes))]!r} is empty; give it at least one sample id")
        codes = self.codes(_join(arrays, strings=self.ids.dtype == pl.String))
        offsets = np.r_[0, np.cumsum(sizes)[:-1]]
        self._refuse_duplicates(codes, offsets, names=names, sizes=sizes)
        if sizes.max() >= len(self):
            name = names[int(np.argmax(sizes))]
            raise InputError(f"subset {name!r} is the whole training set of {len(self)}; leave samples to train on")
        return PackedSubsets(names, codes, offsets, sizes)

    def _refuse_duplicates(self, codes: Ints, offsets: Ints, *, names: list[Any], sizes: Ints) -> None:
        # Each subset writes its own places into one table: a place overwritten by a later one belongs to a duplicate.
        last = np.empty(len(self), dtype=np.int64)
        place = np.arange(int(sizes.max()))
        for row, (start, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
            part = codes[start : start + size]
            last[part] = place[:size]
            clash = last[part] != place[:size]
            if clash.any():
                twice = self.ids[int(part[int(np.argmax(clash))])]
                raise InputError(f"subset {names[row]!r} holds sample id {twice!r} more than once; list each id once")


def _flat(member: Any, name: Any) -> Any:
    if isinstance(member, str | bytes) or not hasattr(member, "__len__"):
        member = list(member) if hasattr(member, "__iter__") and not isinstance(member, str | bytes) else None
    if member is None:
        raise InputError(f"subset {name!r} is not a sequence of sample ids; pass a list or an array of ids")
    if isinstance(member, set | frozenset):
        member = sorted(member)
    if isinstance(member, np.ndarray) and member.ndim != 1:
        raise InputError(f"subset {name!r} has shape {member.shape}; pass a flat sequence of ids")
    return member


def _strings(ids: Any) -> Any:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _join(arrays: list[Any], *, strings: bool) -> Any:
    if strings:
        parts = [item if isinstance(item, pl.Series) else pl.Series(_strings(item), strict=False) for item in arrays]
        kinds = {part.dtype for part in parts}
        if kinds != {pl.String}:
            odd = next(part for part in parts if part.dtype != pl.String)
            raise InputError(f"sample id {odd[0]!r} has type {odd.dtype}; the run's ids are strings")
        return pl.concat(parts)
    parts = [item.to_numpy() if isinstance(item, pl.Series) else np.asarray(item) for item in arrays]
    for part in parts:
        if part.dtype.kind not in "iu":
            raise InputError(f"sample id {part.tolist()[0]!r} has type {part.dtype}; the run's ids are integers")
    return np.concatenate(parts)
