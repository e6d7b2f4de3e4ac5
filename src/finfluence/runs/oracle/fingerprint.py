"""Short hashes of data, models and tasks, by which a resumed experiment notices that it is another one."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from finfluence.runs.data import Collate, take
from finfluence.runs.tasks import Contrast, is_function_query

_SAMPLES = 256
_BYTES = 64 << 20  # of a sample or a tensor; more is hashed in evenly spaced pieces


def of_batch(batch: Any) -> str:
    """Hash of a nested batch's values; of a function its name, which is all that lasts from one session to the next."""
    if isinstance(batch, Contrast):
        sides = {"first": of_batch(batch.first), "second": of_batch(batch.second)}
        return of_batch(sides if batch.weight == 1 else sides | {"weight": batch.weight})
    if is_function_query(batch):
        return of_batch(_function_name(batch))
    digest = hashlib.sha256()
    leaves, spec = tree_flatten(batch)
    digest.update(str(spec).encode())
    for leaf in leaves:
        _update(digest, leaf)
    return digest.hexdigest()[:16]


def _function_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def of_dataset(dataset: Any, n: int, collate: Collate | None) -> str | None:
    """Hash of up to 256 evenly spaced samples; None where a sample is not the same twice (random augmentation)."""
    rows = np.unique(np.linspace(0, n - 1, min(n, _SAMPLES)).astype(np.int64))
    first = take(dataset, rows[:1], collate=collate)
    if of_batch(first) != of_batch(take(dataset, rows[:1], collate=collate)):
        return None
    digest = hashlib.sha256(str(n).encode())
    for row in rows:
        digest.update(of_batch(take(dataset, row[None], collate=collate)).encode())
    return digest.hexdigest()[:16]


def of_model(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        _update(digest, tensor)
    return digest.hexdigest()[:16]


def of_task(task: Any) -> str:
    """The task's class and its plain attributes."""
    plain = {k: v for k, v in sorted(vars(task).items()) if isinstance(v, (bool, int, float, str, type(None)))}
    return f"{type(task).__qualname__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        size = flat.numel() * flat.element_size()
        if size > _BYTES:
            flat = flat[:: -(-size // _BYTES)]
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        # bytes by way of uint8, because NumPy does not know bfloat16
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
