"""Rows that wait in memory for the next part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finfluence.signals._schema import IdDtype


@dataclass(frozen=True)
class Batch:
    """The rows of one step, as one call gave them.

    Attributes:
        step: the step's number.
        place: further columns whose value all these rows share (epoch and position, or subset and arm).
        samples: (b,) identifiers; empty in a table without them.
        values: (b, n_columns) float32.
    """

    step: int
    place: Mapping[str, int | str]
    samples: npt.NDArray[Any] | list[str]
    values: npt.NDArray[np.float32]


class Buffer:
    """The batches of one table that no part holds yet."""

    def __init__(self, schema: pa.Schema, id_dtype: IdDtype) -> None:
        self._schema = schema
        self._id_dtype = id_dtype
        self._batches: list[Batch] = []
        self.rows = 0

    def add(self, batch: Batch) -> None:
        """Append a batch."""
        self._batches.append(batch)
        self.rows += len(batch.values)

    def select(self, keep: Callable[[int], bool]) -> list[Batch]:
        """Return the batches of the steps that `keep` accepts, in the order in which they came."""
        return [batch for batch in self._batches if keep(batch.step)]

    def drop(self, reject: Callable[[int], bool]) -> None:
        """Forget the batches of the steps that `reject` accepts."""
        self._batches = [batch for batch in self._batches if not reject(batch.step)]
        self.rows = sum(len(batch.values) for batch in self._batches)

    def steps(self) -> list[int]:
        """Return the distinct steps, sorted."""
        return sorted({batch.step for batch in self._batches})

    def table(self, batches: Sequence[Batch]) -> pa.Table:
        """Return batches as one Arrow table of the table's schema."""
        sizes = [len(batch.values) for batch in batches]
        values = np.concatenate([batch.values for batch in batches])
        columns: list[pa.Array] = []
        for field in list(self._schema)[: len(self._schema) - values.shape[1]]:
            if field.name == "sample":
                columns.append(self._identifiers(batches))
                continue
            per_batch = [batch.step if field.name == "step" else batch.place[field.name] for batch in batches]
            columns.append(pa.array(np.repeat(per_batch, sizes), type=field.type))
        columns += [pa.array(np.ascontiguousarray(values[:, column])) for column in range(values.shape[1])]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _identifiers(self, batches: Sequence[Batch]) -> pa.Array:
        if self._id_dtype == "int64":
            return pa.array(np.concatenate([batch.samples for batch in batches]))
        return pa.array([one for batch in batches for one in batch.samples], type=pa.string())
