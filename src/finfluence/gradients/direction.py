"""Directions in parameter space: what a per-sample gradient is projected on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from finfluence.errors import InputError

# Tensors up to _SMALL entries are concatenated, _TOGETHER at a time, before they are multiplied.
_SMALL, _TOGETHER = 1 << 18, 64


@dataclass(frozen=True)
class LinearFactors:
    """The weight part of a direction for one nn.Linear as a sum of few outer products, scale · deltaᵀ x.

    A loss over r input rows has exactly this weight gradient (x the layer's input rows, delta the gradient at its
    output rows), and then x q_Wᵀ = (x Xᵀ) Δ costs n·r·(d_in + d_out) instead of n·d_in·d_out.

    Args:
        x: (r, d_in) input rows.
        delta: (r, d_out) output-gradient rows.
        scale: factor on the whole product.
    """

    x: Tensor
    delta: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.delta.ndim != 2 or self.x.shape[0] != self.delta.shape[0]:
            raise InputError(
                f"LinearFactors needs x (r, d_in) and delta (r, d_out), got {tuple(self.x.shape)} and "
                f"{tuple(self.delta.shape)}; flatten the leading dimensions of both to the same r rows"
            )

    def dense(self) -> Tensor:
        """The weight direction that the factors stand for, (d_out, d_in)."""
        return self.scale * (self.delta.mT @ self.x)


class Direction:
    """A direction q in the space of a model's parameters, by name; a name that is missing stands for zero.

    Scaling is lazy: `scaled` costs nothing, and `tensors` multiplies only when it is read.

    Args:
        tensors: name → tensor of the parameter's shape, named as in `dict(model.named_parameters())`.
        factors: module name → `LinearFactors` of that nn.Linear's weight. They repeat, cheaper, what `tensors` holds
            for the weight; where both are given they must agree (`query_gradient` checks its own).
    """

    __slots__ = ("_coefficient", "_factors", "_raw", "_scaled")

    def __init__(self, tensors: Mapping[str, Tensor], *, factors: Mapping[str, LinearFactors] | None = None) -> None:
        self._raw: Mapping[str, Tensor] = MappingProxyType({name: t.detach() for name, t in tensors.items()})
        self._factors: Mapping[str, LinearFactors] = MappingProxyType(dict(factors or {}))
        self._coefficient = 1.0
        self._scaled: Mapping[str, Tensor] | None = None

    def __repr__(self) -> str:
        return f"Direction({len(self._raw)} tensors, {len(self._factors)} factored, coefficient {self._coefficient:g})"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Name → tensor of the direction, scaled."""
        if self._coefficient == 1.0:
            return self._raw
        if self._scaled is None:
            self._scaled = MappingProxyType({name: t * self._coefficient for name, t in self._raw.items()})
        return self._scaled

    @property
    def factors(self) -> Mapping[str, LinearFactors]:
        """Module name → factors of that Linear's weight, scaled."""
        if self._coefficient == 1.0:
            return self._factors
        return {n: LinearFactors(f.x, f.delta, f.scale * self._coefficient) for n, f in self._factors.items()}

    @property
    def unscaled(self) -> tuple[Mapping[str, Tensor], Mapping[str, LinearFactors], float]:
        """Tensors and factors before scaling, and the coefficient: for kernels that scale the result instead."""
        return self._raw, self._factors, self._coefficient

    def scaled(self, coefficient: float) -> Direction:
        """The direction times a number, sharing this one's memory.

        Args:
            coefficient: finite factor, for SGD the negative learning rate.

        Returns:
            A new direction; this one is unchanged.
        """
        result = Direction.__new__(Direction)
        result._raw, result._factors, result._scaled = self._raw, self._factors, None
        result._coefficient = self._coefficient * float(coefficient)
        return result

    def dot(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """The inner product ⟨q, g⟩ over the names that both have.

        Args:
            gradients: name → gradient (dense or sparse; None counts as zero), e.g. `p.grad` by name.

        Returns:
            () float64 on the device of the first tensor; low-precision tensors are multiplied in float32.
        """
        parts: list[Tensor] = []
        small: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for name, q in self._raw.items():
            gradient = gradients.get(name)
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            dtype = torch.float64 if torch.float64 in (q.dtype, gradient.dtype) else torch.float32
            left, right = q.to(dtype).reshape(-1), gradient.detach().to(device=q.device, dtype=dtype).reshape(-1)
            if left.numel() > _SMALL:
                parts.append(torch.dot(left, right))
            else:
                small.setdefault((left.device, dtype), []).append((left, right))
        for pairs in small.values():  # one launch for many: LoRA has hundreds of small matrices
            for start in range(0, len(pairs), _TOGETHER):
                lefts, rights = zip(*pairs[start : start + _TOGETHER], strict=True)
                parts.append(torch.dot(torch.cat(lefts), torch.cat(rights)))
        if not parts:
            return torch.zeros((), dtype=torch.float64)
        device = next(iter(self._raw.values())).device
        return torch.stack([part.to(device, torch.float64) for part in parts]).sum() * self._coefficient
