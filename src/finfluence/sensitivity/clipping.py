"""Gradient clipping by global norm, forwards and backwards."""

from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from finfluence.errors import InputError

ClipDerivative = Literal["constant", "exact"]

# torch.nn.utils.clip_grad_norm_ adds this to the norm before dividing.
_TORCH_OFFSET = 1e-6


def clip_factor(norm: float, max_norm: float) -> float:
    """The factor c_t = min(1, C / (‖g‖ + 1e-6)) of torch.nn.utils.clip_grad_norm_, by which the gradient is multiplied.

    Args:
        norm: ‖g‖ over all parameters, before clipping.
        max_norm: The bound C.

    Returns:
        c_t in (0, 1].

    Raises:
        InputError: max_norm is not a finite number > 0, or norm is negative.
    """
    if not isfinite(max_norm) or max_norm <= 0:
        raise InputError(f"max_norm is {max_norm!r}; give a finite number > 0")
    if norm < 0:
        raise InputError(f"gradient norm is {norm!r}; a norm is >= 0")
    return min(1.0, max_norm / (norm + _TORCH_OFFSET))


def clip_vjp(q: Tensor, gradient: Tensor, *, factor: float, derivative: ClipDerivative = "constant") -> Tensor:
    """Sensitivity to the gradient before clipping, from that to the clipped gradient that the optimizer received.

    `"constant"` takes the recorded factor c_t as given: q_before = c_t · q. It ignores that a sample which lengthens
    the gradient also shrinks everybody's share; signals then still sum to ⟨q, gradient as the optimizer saw it⟩, which
    is the identity that is checked at every step. `"exact"` differentiates the clip:
    q_before = c_t · (q − ĝ ⟨ĝ, q⟩ · ‖g‖/(‖g‖ + 1e-6)) where it is active, ĝ = g/‖g‖, and then the signals of a clipped
    batch sum to about zero, because the gradient's length no longer matters.

    Args:
        q: (..., size) sensitivity to the clipped gradient, flat over all parameters.
        gradient: (size,) the gradient before clipping.
        factor: The recorded factor c_t; 1 where the clip was inactive.
        derivative: `"constant"` (default) or `"exact"`.

    Returns:
        (..., size) sensitivity to the gradient before clipping.

    Raises:
        InputError: derivative is unknown.
    """
    if derivative not in get_args(ClipDerivative):
        raise InputError(f"derivative is {derivative!r}; choose one of {list(get_args(ClipDerivative))}")
    if factor == 1.0:
        return q
    if derivative == "constant":
        return q * factor
    square = torch.dot(gradient, gradient)
    norm = square.sqrt()
    along = (q @ gradient).unsqueeze(-1) / (square + _TORCH_OFFSET * norm)
    return (q - along * gradient) * factor
