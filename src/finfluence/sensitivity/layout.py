"""Named tensors as one flat vector, so that a small model costs a handful of kernel launches a step, not hundreds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from finfluence.errors import InputError


@dataclass(frozen=True)
class Layout:
    """The order and the shapes in which named tensors lie in a flat vector of length `size`.

    Every method accepts leading axes, e.g. one for queries: tensors of shape (..., *shape) and vectors of shape (...,
    size).

    Args:
        names: The tensors' names, in the vector's order.
        shapes: Their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("a layout needs at least one tensor, got none; pass the trainable parameters by name")
        if len(self.names) != len(self.shapes):
            raise InputError(f"{len(self.names)} names but {len(self.shapes)} shapes; give one shape a name")
        if len(set(self.names)) != len(self.names):
            raise InputError(f"duplicate names in a layout: {sorted(self.names)}; give each tensor its own name")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], names: Sequence[str] | None = None) -> "Layout":
        """Read the layout of named tensors.

        Args:
            tensors: Name → tensor, all of one dtype on one device.
            names: The order to use; the mapping's own by default.

        Returns:
            The layout.

        Raises:
            InputError: No tensors, or several dtypes or devices.
        """
        order = tuple(tensors) if names is None else tuple(names)
        kinds = {(str(tensors[name].dtype), str(tensors[name].device)) for name in order}
        if len(kinds) > 1:
            raise InputError(
                f"parameters of several dtypes or devices cannot share a vector: {sorted(kinds)}; "
                "bring the trainable parameters to one dtype and device"
            )
        return cls(order, tuple(tuple(tensors[name].shape) for name in order))

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor."""
        return [prod(shape) for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor], *, out: Tensor | None = None) -> Tensor:
        """Concatenate named tensors (..., *shape) into one vector (..., size).

        Args:
            tensors: Name → tensor; more names than the layout's do no harm.
            out: A vector to be filled and returned; a new one by default. The tensors must not require gradients then.

        Raises:
            InputError: A name of the layout is missing, or a tensor has another shape.
        """
        try:
            values = [tensors[name] for name in self.names]
        except KeyError as missing:
            raise InputError(
                f"no tensor for parameter {missing}; give one for each of the layout's {len(self.names)} names "
                "(zeros for a parameter that the loss does not use)"
            ) from None
        lead = values[0].shape[: values[0].ndim - len(self.shapes[0])]
        for name, value, shape in zip(self.names, values, self.shapes, strict=True):
            if value.shape != lead + shape:
                raise InputError(f"{name} has shape {tuple(value.shape)}; expected {tuple(lead + shape)}")
        return torch.cat([value.reshape(*lead, -1) for value in values], dim=-1, out=out)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector (..., size) into named views (..., *shape); differentiable."""
        lead = vector.shape[:-1]
        pieces = vector.split(self.sizes, dim=-1)
        return {
            name: piece.reshape(lead + shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def means(self, vector: Tensor) -> Tensor:
        """Mean of each tensor's elements, repeated over that tensor: (..., size) → (..., size)."""
        if len(self.names) == 1:
            return vector.mean(dim=-1, keepdim=True)
        pieces = vector.split(self.sizes, dim=-1)
        return torch.cat([piece.mean(dim=-1, keepdim=True).expand_as(piece) for piece in pieces], dim=-1)
