"""Per-sample directional derivatives of a loss function that the caller owns: three interchangeable ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finfluence.errors import InputError, RecordingError
from finfluence.gradients._replay import (
    Ambience,
    automatic_epsilon,
    devices_of,
    differences,
    lacks_forward_mode,
    tangents,
)
from finfluence.gradients.checks import check_model
from finfluence.gradients.direction import Direction
from finfluence.gradients.hooks import HookedDerivatives

Losses = Callable[[nn.Module], Tensor]
Method = Literal["hooks", "jvp", "finite-difference"]


def per_sample_derivatives(
    losses: Losses,
    model: nn.Module,
    *,
    parameters: Mapping[str, nn.Parameter],
    directions: Sequence[Direction],
    method: Method = "hooks",
    weights: Tensor | None = None,
) -> Tensor:
    """⟨q_k, w_i ∇ℓ_i⟩ for every sample i and direction k, changing neither gradients, buffers nor random states.

    Args:
        losses: model → (b,) loss of every sample.
        model: in the mode in which the losses are meant.
        parameters: name → parameter, named as in `dict(model.named_parameters())`.
        directions: q_k.
        method: "hooks" (one forward and backward pass), "jvp" (one forward-mode pass a direction; exact, nothing to
            infer about layouts) or "finite-difference" (two forward passes a direction, no autograd; least exact).
        weights: (b,) w_i; None for 1.

    Returns:
        (b, n_directions), float32, or float64 for a float64 model.

    Raises:
        InputError: losses is not (b,), weights do not fit it, or the method is unknown.
        RecordingError: the model couples samples, or (hooks) samples cannot be told apart in some layer.
    """
    ways = {"hooks": hooks_derivatives, "jvp": jvp_derivatives, "finite-difference": finite_difference_derivatives}
    if method not in ways:
        raise InputError(f"method is {method!r}; choose from {', '.join(map(repr, ways))}")
    values = ways[method](losses, model, parameters=parameters, directions=directions)
    if weights is None:
        return values
    if weights.shape != values.shape[:1]:
        raise InputError(f"weights have shape {tuple(weights.shape)} for {len(values)} losses; give one a sample")
    return values * weights.to(values.device, values.dtype).unsqueeze(1)


def hooks_derivatives(
    losses: Losses, model: nn.Module, *, parameters: Mapping[str, nn.Parameter], directions: Sequence[Direction]
) -> Tensor:
    """⟨q_k, ∇ℓ_i⟩ by hooks, in one forward and backward pass that leaves p.grad alone; see `per_sample_derivatives`."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    ambience = Ambience.capture(devices_of(model), rng=True)
    with ambience.entered(), torch.no_grad():
        batch_size = len(_checked(losses(model)))
    hooks = HookedDerivatives(model, trained)
    try:
        with ambience.entered(), torch.enable_grad(), hooks.record(directions, batch_size) as recording:
            torch.autograd.grad(_checked(losses(model)).sum(), list(trained.values()), allow_unused=True)
        return recording.values
    finally:
        hooks.remove()


def jvp_derivatives(
    losses: Losses, model: nn.Module, *, parameters: Mapping[str, nn.Parameter], directions: Sequence[Direction]
) -> Tensor:
    """⟨q_k, ∇ℓ_i⟩ in forward mode through the vector of losses, one pass a direction; see `per_sample_derivatives`.

    Attention runs with the math kernel; every pass sees the same random state.
    """

    def derive(whole: nn.Module, q: dict[str, Tensor], ambience: Ambience) -> Tensor:
        try:
            (values,), (tangent,) = tangents(whole, q, ambience=ambience)
        except RuntimeError as error:
            if not lacks_forward_mode(error):
                raise
            raise RecordingError(f"method='jvp': {str(error).splitlines()[0]}; use 'finite-difference'") from error
        return torch.zeros_like(values) if tangent is None else tangent

    return _each_direction(losses, model, parameters, directions, derive)


def finite_difference_derivatives(
    losses: Losses,
    model: nn.Module,
    *,
    parameters: Mapping[str, nn.Parameter],
    directions: Sequence[Direction],
    epsilon: float | Literal["auto"] = "auto",
) -> Tensor:
    """⟨q_k, ∇ℓ_i⟩ by (ℓ_i(θ + εq) − ℓ_i(θ − εq)) / 2ε, without autograd; see `per_sample_derivatives`.

    Args:
        losses: model → (b,) loss of every sample.
        model: in the mode in which the losses are meant.
        parameters: name → parameter.
        directions: q_k.
        epsilon: step along q; "auto" from the parameters' dtype and the norms of parameters and direction.
            Typical relative error: 1e-7 in float64, 1e-2 in float32; more where a ReLU switches within the step.
    """
    if epsilon != "auto" and not epsilon > 0:
        raise InputError(f"epsilon is {epsilon}; it must be positive or 'auto'")

    def derive(whole: nn.Module, q: dict[str, Tensor], ambience: Ambience) -> Tensor:
        step = automatic_epsilon(dict(whole.named_parameters()), q) if epsilon == "auto" else epsilon
        _, (difference,) = differences(whole, q, ambience=ambience, epsilon=step)
        assert difference is not None
        return difference

    return _each_direction(losses, model, parameters, directions, derive)


class _Losses(nn.Module):
    """The loss function as a module, so that the model's parameters can be substituted in it."""

    def __init__(self, losses: Losses, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._losses = losses
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _checked(self._losses(self.model))


def _each_direction(
    losses: Losses,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    directions: Sequence[Direction],
    derive: Callable[[nn.Module, dict[str, Tensor], Ambience], Tensor],
) -> Tensor:
    check_model(model)
    if not directions:
        raise InputError("0 directions; pass at least one")
    whole = _Losses(losses, model)
    local = {id(p): name for name, p in whole.named_parameters()}
    ambience = Ambience.capture(devices_of(model), rng=True)
    double = any(p.dtype == torch.float64 for p in parameters.values())
    columns = []
    for direction in directions:
        tensors, _, coefficient = direction.unscaled
        q = {local[id(parameters[name])]: t for name, t in tensors.items() if name in parameters}
        column = derive(whole, q, ambience) * coefficient
        columns.append(column.to(torch.float64 if double else torch.float32))
    return torch.stack(columns, dim=1)


def _checked(losses: object) -> Tensor:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        seen = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(f"losses must return one loss a sample, (b,), got {seen}; use reduction='none'")
    return losses
