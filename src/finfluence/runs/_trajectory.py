"""What a segment of a replay passes through, kept in memory or in a file without a name."""

from __future__ import annotations

import tempfile
from typing import Any

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


class Trajectory:
    """Parameters before every step of a segment, and where they are needed gradients and optimizer states.

    Args:
        steps: steps in the segment.
        update: the flat update.
        example: a flat vector of the right dtype and device.
        vectors: as `kept_vectors` counts them.
        budget: bytes above which they go to a file.
    """

    def __init__(self, steps: int, update: FlatUpdate, example: Tensor, *, vectors: int, budget: int) -> None:
        self.update, self.vectors = update, vectors
        self._keys = _state_keys(update)
        self.factors = np.ones(steps)
        shape = (steps, vectors, update.layout.size)
        fits = steps * vectors * update.layout.size * example.element_size() <= budget
        self._store: Any = _Memory(shape, example) if fits else _File(shape, example)

    def close(self) -> None:
        """Gives the memory or the file back."""
        self._store.close()

    def put(self, row: int, theta: Tensor, state: States, gradient: Tensor | None, factor: float) -> None:
        """Keeps what was there before a step, its gradient before clipping, and the factor of clipping."""
        self.factors[row] = factor
        self._store.put(row, 0, 0, theta)
        if self.vectors == 1 or gradient is None:
            return
        self._store.put(row, 1, 0, gradient)
        for group, own in zip(self.update.groups, state, strict=True):
            for slot, value in enumerate(own.values(), 2):
                self._store.put(row, slot, group.start, value)

    def theta(self, row: int) -> Tensor:
        """(size,) parameters before the step."""
        return self._store.get(row, 0, 0, self.update.layout.size)

    def gradient(self, row: int) -> Tensor | None:
        """(size,) gradient of the step before clipping; None where it is not kept."""
        return None if self.vectors == 1 else self._store.get(row, 1, 0, self.update.layout.size)

    def state(self, row: int) -> States:
        """Optimizer state before the step; empty where it is not kept."""
        if self.vectors == 1:
            return tuple({} for _ in self.update.groups)
        return tuple(
            {key: self._store.get(row, slot, group.start, group.stop) for slot, key in enumerate(keys, 2)}
            for group, keys in zip(self.update.groups, self._keys, strict=True)
        )


class _Memory:
    def __init__(self, shape: tuple[int, int, int], example: Tensor) -> None:
        self._tensor = torch.empty(shape, dtype=example.dtype, device=example.device)

    def put(self, row: int, slot: int, start: int, vector: Tensor) -> None:
        self._tensor[row, slot, start : start + len(vector)] = vector

    def get(self, row: int, slot: int, start: int, stop: int) -> Tensor:
        return self._tensor[row, slot, start:stop]

    def close(self) -> None:
        del self._tensor


class _File:
    """Vectors in a temporary file, which has no name once it is open: a killed replay leaves nothing behind.

    Read and written, not mapped: mapped pages would count as the process's memory.
    """

    def __init__(self, shape: tuple[int, int, int], example: Tensor) -> None:
        self._shape, self._dtype, self._device = shape, example.dtype, example.device
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the trajectory

    def _seek(self, row: int, slot: int, start: int) -> None:
        _, slots, size = self._shape
        self._file.seek(((row * slots + slot) * size + start) * self._dtype.itemsize)

    def put(self, row: int, slot: int, start: int, vector: Tensor) -> None:
        self._seek(row, slot, start)
        data = _bytes(vector.detach().cpu().contiguous())
        while data:
            data = data[self._file.write(data) :]

    def get(self, row: int, slot: int, start: int, stop: int) -> Tensor:
        self._seek(row, slot, start)
        vector = torch.empty(stop - start, dtype=self._dtype)
        data = _bytes(vector)
        while data and (count := self._file.readinto(data)):
            data = data[count:]
        return vector.to(self._device)

    def close(self) -> None:
        self._file.close()


def _state_keys(update: FlatUpdate) -> list[list[str]]:
    return [list(group.rule.init(torch.zeros(1))) for group in update.groups]


def _bytes(vector: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory; through uint8, because NumPy knows no bfloat16."""
    array: Any = vector.view(torch.uint8).numpy()
    return memoryview(array)
