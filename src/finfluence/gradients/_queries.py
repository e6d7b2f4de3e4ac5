"""Directions made ready for the rules: stacked, cast, and kept from one record to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finfluence.errors import InputError
from finfluence.gradients.direction import Direction, LinearFactors

_STACK_LIMIT = 1 << 20  # elements; above it one launch a direction costs nothing, and a stacked copy would cost memory


class QueryTable:
    """The directions of one record, by parameter, unscaled; `coefficients` scales the finished columns.

    Args:
        directions: q_k; none where only the samples' own gradients are wanted.
        shapes: parameter name → shape, to check the directions against.
    """

    def __init__(self, directions: Sequence[Direction], shapes: Mapping[str, torch.Size]) -> None:
        self._parts = [d.unscaled for d in directions]
        self.coefficients = [coefficient for _, _, coefficient in self._parts]
        self._cache: dict[Any, Any] = {}
        self._fingerprint = _fingerprint(directions)
        for tensors, _, _ in self._parts:
            for name, tensor in tensors.items():
                if name in shapes and tensor.shape != shapes[name]:
                    raise InputError(
                        f"direction of parameter {name!r} has shape {tuple(tensor.shape)}, the parameter "
                        f"{tuple(shapes[name])}; build the direction from this model's gradients"
                    )
                if name not in shapes and bool(tensor.any()):
                    raise InputError(
                        f"direction names {name!r}, which is not a recorded parameter; "
                        "name the parameters as in dict(model.named_parameters())"
                    )

    def __len__(self) -> int:
        return len(self._parts)

    def matches(self, directions: Sequence[Direction]) -> bool:
        """Whether the table was made of these directions, unchanged up to their coefficients."""
        return self._fingerprint == _fingerprint(directions)

    def rescaled(self, directions: Sequence[Direction]) -> QueryTable:
        """This table with the coefficients of other directions that it matches."""
        self.coefficients = [d.unscaled[2] for d in directions]
        return self

    def tensor(self, name: str, direction: int) -> Tensor | None:
        """One direction of one parameter, unscaled."""
        return self._parts[direction][0].get(name)

    def involves(self, names: Collection[str]) -> bool:
        """Whether any direction is non-zero in any of these parameters."""
        return any(name in tensors for tensors, _, _ in self._parts for name in names)

    def dense(self, name: str, *, dtype: torch.dtype, without: Sequence[int] = ()) -> list[tuple[list[int], Tensor]]:
        """Groups (direction numbers, stacked tensors) of the directions that have the parameter."""
        key = (name, dtype, tuple(without))
        if key not in self._cache:
            found = [
                (k, tensors[name].to(dtype))
                for k, (tensors, _, _) in enumerate(self._parts)
                if name in tensors and k not in without
            ]
            self._cache[key] = _grouped(found)
        return self._cache[key]

    def factors(self, module: str) -> dict[int, LinearFactors]:
        """The directions that have factors for a module."""
        return {k: factors[module] for k, (_, factors, _) in enumerate(self._parts) if module in factors}

    def factored(self, module: str, *, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor, Tensor] | None:
        """Direction numbers, all rows X and Δ, and the membership (r, k) of rows in directions, with their scales."""
        key = (module, dtype)
        if key not in self._cache:
            found = self.factors(module)
            if not found:
                self._cache[key] = None
                return None
            rows = torch.cat([f.x for f in found.values()]).to(dtype)
            deltas = torch.cat([f.delta for f in found.values()]).to(dtype)
            accumulate = torch.float64 if dtype == torch.float64 else torch.float32
            membership = torch.zeros(len(rows), len(found), dtype=accumulate, device=rows.device)
            start = 0
            for column, factor in enumerate(found.values()):
                membership[start : start + len(factor.x), column] = factor.scale
                start += len(factor.x)
            self._cache[key] = (list(found), rows, deltas, membership)
        return self._cache[key]


class ModuleQueries:
    """The `LocalQueries` of one module: local parameter names, and its factors if its weight is its own."""

    def __init__(self, table: QueryTable, names: Mapping[str, str], module_name: str) -> None:
        self._table, self._names, self._module_name = table, names, module_name

    def dense(self, name: str, *, dtype: torch.dtype) -> list[tuple[list[int], Tensor]]:
        """See `LocalQueries.dense`."""
        if name not in self._names:
            return []
        without = tuple(self._table.factors(self._module_name)) if name == "weight" else ()
        return self._table.dense(self._names[name], dtype=dtype, without=without)

    def factored(self, *, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor, Tensor] | None:
        """See `LocalQueries.factored`."""
        return self._table.factored(self._module_name, dtype=dtype) if "weight" in self._names else None


def _grouped(found: list[tuple[int, Tensor]]) -> list[tuple[list[int], Tensor]]:
    if len(found) > 1 and sum(tensor.numel() for _, tensor in found) <= _STACK_LIMIT:
        return [([k for k, _ in found], torch.stack([tensor for _, tensor in found]))]
    return [([k], tensor.unsqueeze(0)) for k, tensor in found]


def _fingerprint(directions: Sequence[Direction]) -> list[Any]:
    """Identity and version of every tensor, so that an in-place refresh is seen."""
    return [
        [(name, id(t), t._version) for name, t in tensors.items()]
        + [(name, id(f.x), f.x._version, id(f.delta), f.delta._version, f.scale) for name, f in factors.items()]
        for tensors, factors, _ in (d.unscaled for d in directions)
    ]
