"""What a segment of a replay passes through, kept in memory or in a file without a name."""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finfluence.sensitivity import FlatUpdate, SGDRule, States


def kept_vectors(update: FlatUpdate, *, clip_exactly: bool) -> int:
    """Vectors of the parameters' size that walking back through one step needs.

    Args:
        update: the optimizer's update.
        clip_exactly: whether gradient clipping is differentiated.

    Returns:
        1 (the parameters) for SGD, whose derivative looks at neither gradient nor state; with them, 2 and more.
    """
    linear = all(isinstance(group.rule, SGDRule) for group in update.groups)
    return 1 if linear and not clip_exactly else 2 + max(len(keys) for keys in _state_keys(update))


class Point(NamedTuple):
    """What there was before a step.

    Attributes:
        theta: (size,) parameters.
        gradient: (size,) gradient of the step before clipping; None where it is not kept.
        state: optimizer state; empty where it is not kept.
    """

    theta: Tensor
    gradient: Tensor | None
    state: States


class Trajectory:
    """The points before every step of a segment.

    One serves all segments of a replay, each written over the last: memory that is in place already costs less.

    Args:
        steps: steps in the longest segment.
        update: the flat update.
        example: a flat vector of the right dtype and device.
        vectors: as `kept_vectors` counts them.
        budget: bytes that may be in memory; the steps beyond are in a file.
    """

    def __init__(self, steps: int, update: FlatUpdate, example: Tensor, *, vectors: int, budget: int) -> None:
        self.update, self._keys = update, _state_keys(update)
        self.factors = np.ones(steps)
        size = update.layout.size
        self._held = min(steps, budget // max(1, vectors * size * example.element_size()))
        self._file = None if self._held == steps else _File()
        # a row for each step that is held, and one more through which the others go to the file and come back
        rows = self._held if self._file is None else self._held + 1
        self._rows = torch.empty((rows, vectors, size), dtype=example.dtype, device=example.device)

    def close(self) -> None:
        """Gives the memory or the file back."""
        del self._rows
        if self._file is not None:
            self._file.close()

    def blank(self, row: int) -> Point:
        """The point to be filled with what there is before a step; `keep` it before the next."""
        return self._point(min(row, self._held))

    def keep(self, row: int, factor: float) -> None:
        """Keeps what the blank has been filled with, and the factor of clipping."""
        self.factors[row] = factor
        if self._file is not None and row >= self._held:
            self._file.write(row - self._held, self._rows[-1])

    def point(self, row: int) -> Point:
        """What there was before a step; to be used before the next is asked for."""
        if self._file is not None and row >= self._held:
            self._file.read(row - self._held, self._rows[-1])
        return self.blank(row)

    def _point(self, row: int) -> Point:
        theta, *others = self._rows[row].unbind(0)
        if not others:
            return Point(theta, None, tuple({} for _ in self.update.groups))
        gradient, *vectors = others
        state = tuple(
            {key: vector[group.start : group.stop] for key, vector in zip(keys, vectors, strict=False)}
            for group, keys in zip(self.update.groups, self._keys, strict=True)
        )
        return Point(theta, gradient, state)


class _File:
    """Rows in a temporary file, which has no name once it is open: a killed replay leaves nothing behind.

    Read and written, not mapped: mapped pages would count as the process's memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the trajectory

    def write(self, row: int, values: Tensor) -> None:
        data = _bytes(values.cpu())
        self._file.seek(row * len(data))
        while data:
            data = data[self._file.write(data) :]

    def read(self, row: int, into: Tensor) -> None:
        values = into if into.device.type == "cpu" else torch.empty(into.shape, dtype=into.dtype)
        data = _bytes(values)
        self._file.seek(row * len(data))
        while data and (count := self._file.readinto(data)):
            data = data[count:]
        if values is not into:
            into.copy_(values)

    def close(self) -> None:
        self._file.close()


def _state_keys(update: FlatUpdate) -> list[list[str]]:
    return [list(group.rule.init(torch.zeros(1))) for group in update.groups]


def _bytes(values: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory; through uint8, because NumPy knows no bfloat16."""
    array: Any = values.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
