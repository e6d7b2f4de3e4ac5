"""From a map-style dataset and sample indices to a batch on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from finfluence.errors import InputError
from finfluence.runs.tasks import Contrast, is_function_query

Collate = Callable[[list[Any]], Any]


def dataset_size(dataset: Any) -> int:
    """Number of samples in a map-style dataset.

    Raises:
        InputError: the dataset has no length, or is empty.
    """
    try:
        n = len(dataset)
    except TypeError:
        raise InputError(
            f"{type(dataset).__name__} has no length; finfluence needs a map-style dataset (with __len__ and "
            "__getitem__), because samples are named by their index"
        ) from None
    if n == 0:
        raise InputError("the dataset is empty; give at least one batch of samples")
    return n


def take(dataset: Any, indices: np.ndarray, *, collate: Collate | None = None, device: Any = None) -> Any:
    """The batch made of the given samples.

    Args:
        dataset: a map-style dataset.
        indices: (b,) int64 positions in the dataset.
        collate: makes a batch of a list of samples; default torch.utils.data.default_collate.
        device: where tensors of the batch are moved.

    Returns:
        A batch as the Task expects it.
    """
    if isinstance(dataset, TensorDataset) and collate is None:
        rows = torch.from_numpy(np.ascontiguousarray(indices))
        batch: Any = tuple(t[rows.to(t.device)] for t in dataset.tensors)
    else:
        batch = (collate or default_collate)([dataset[int(i)] for i in indices])
    return to_device(batch, device)


def to_device(batch: Any, device: Any) -> Any:
    """The same nested batch with every tensor on `device` (None leaves it where it is)."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, Contrast):
        return replace(batch, first=to_device(batch.first, device), second=to_device(batch.second, device))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def query_batch(query: Any, *, collate: Collate | None = None, device: Any = None) -> Any:
    """One batch of a query: a map-style dataset is collated whole; a ready batch or a function is passed through.

    Raises:
        InputError: it is none of these, or a contrast of unequal numbers of samples.
    """
    if isinstance(query, Contrast):
        first, second = (query_batch(side, collate=collate, device=device) for side in (query.first, query.second))
        sizes = batch_length(first), batch_length(second)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"a contrast compares two answers to the same prompts, but its sides have {sizes[0]} and {sizes[1]} "
                "samples; give both for every prompt"
            )
        return replace(query, first=first, second=second)
    if is_function_query(query):
        return query
    if isinstance(query, Dataset):
        return take(query, np.arange(dataset_size(query)), collate=collate, device=device)
    if isinstance(query, (Tensor, Mapping, tuple, list)):
        return to_device(query, device)
    if hasattr(query, "__len__") and hasattr(query, "__getitem__"):
        return take(query, np.arange(dataset_size(query)), collate=collate, device=device)
    raise InputError(
        "a query must be a map-style dataset, a ready batch, a Contrast of two or a function of the model, got "
        f"{type(query).__name__}"
    )


def query_batches(queries: Mapping[str, Any], *, collate: Collate | None = None, device: Any = None) -> dict[str, Any]:
    """Every query as one batch (or contrast, or function), by name.

    Raises:
        InputError: there is no query, or one cannot be used.
    """
    if not isinstance(queries, Mapping) or not queries:
        raise InputError('queries must be a non-empty mapping from name to data, for example {"validation": val_set}')
    return {name: query_batch(query, collate=collate, device=device) for name, query in queries.items()}


def model_device(model: torch.nn.Module) -> torch.device:
    """The device of the model's first parameter (CPU where it has none)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor of a nested batch."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def batch_length(batch: Any) -> int | None:
    """Size of the first tensor's leading dimension in a nested batch; None where there is no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Contrast):
        return (batch_length(batch.first) or 0) + (batch_length(batch.second) or 0) or None
    values: Sequence[Any] = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, (tuple, list)):
        for value in values:
            if (length := batch_length(value)) is not None:
                return length
    return None
