"""The signal identity Σ_i x_{i,t} = ⟨q_t, ḡ_t⟩, and what clipping or AMP did to the gradient before the step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finfluence.gradients import Direction

# A ratio of two float32 norms over millions of entries is this exact; closer to 1 means that nothing happened.
_SAME = 1e-5
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_LIMIT = 2e-2
# Clipping by norm and AMP multiply every entry by one factor, so a few thousand entries tell it as well as all of them.
_ENOUGH_ENTRIES = 1 << 14


@dataclass(frozen=True)
class GradientFingerprint:
    """Euclidean norm of part of the gradient, by which a later rescaling (clipping, AMP) is found.

    Attributes:
        norm: () float64.
        names: the parameters that it is taken over.
    """

    norm: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], names: Sequence[str] = ()) -> GradientFingerprint:
        """The fingerprint of what is in `.grad` now.

        Args:
            parameters: trainable parameters by name.
            names: what an earlier fingerprint was taken over; by default the smallest parameters that have enough
                entries together, or all where those have no gradient.
        """
        if names:
            return cls(_joint_norm([parameters[name] for name in names]), tuple(names))
        ordered = sorted(parameters, key=lambda name: parameters[name].numel())
        sizes = itertools.accumulate(parameters[name].numel() for name in ordered)
        few = ordered[: 1 + sum(size < _ENOUGH_ENTRIES for size in sizes)]
        norm = _joint_norm([parameters[name] for name in few])
        if float(norm) > 0 or len(few) == len(ordered):
            return cls(norm, tuple(few))
        return cls(_joint_norm(list(parameters.values())), tuple(ordered))

    def ratio(self, before: GradientFingerprint) -> float:
        """Factor that turned `before` into this gradient; exactly 1 where they are the same to rounding."""
        old, new = float(before.norm), float(self.norm)
        if old == 0.0:
            return 1.0
        factor = new / old
        return 1.0 if abs(factor - 1.0) < _SAME else factor


def _joint_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norms = [_norm(p.grad) for p in parameters if p.grad is not None]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    # in float64: the sum of squares of large gradients under AMP overflows float32
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]))


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    # float16 norms overflow at 65,504, and AMP scales gradients by as much
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))


def identity_residual(values: Tensor, directions: Sequence[Direction], parameters: Mapping[str, nn.Parameter]) -> float:
    """Relative residual of the signal identity, the largest over queries.

    Args:
        values: (b, n_queries) float64 signals of the step.
        directions: sensitivities, one a query.
        parameters: trainable parameters with `.grad` as the optimizer is about to see it.

    Returns:
        max_k |Σ_i x_ik − ⟨q_k, ḡ⟩| / max(|⟨q_k, ḡ⟩|, Σ_i |x_ik|); 0 where both sides are 0.
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    expected = torch.stack([torch.as_tensor(d.dot(gradients)).double().cpu() for d in directions])
    values = values.cpu()
    scale = torch.maximum(expected.abs(), values.abs().sum(0))
    difference = (values.sum(0) - expected).abs()
    return float(torch.where(scale > 0, difference / scale, difference).max())


def tolerance(parameters: Mapping[str, nn.Parameter], *, low_precision: bool = False) -> float:
    """Residual above which the recording is suspect, by the coarsest dtype of the trainable parameters.

    Args:
        parameters: trainable parameters by name.
        low_precision: whether their gradients or signals are no better all the same (autocast, differences).
    """
    if low_precision:
        return _LOW_PRECISION_LIMIT
    return max(_LIMITS.get(p.dtype, _LOW_PRECISION_LIMIT) for p in parameters.values())
