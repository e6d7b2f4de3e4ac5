"""The gradient of a measurement: the direction that per-sample gradients are projected on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finfluence.errors import InputError
from finfluence.gradients._capture import gradient_target
from finfluence.gradients._replay import Ambience, devices_of
from finfluence.gradients._suspend import suspended
from finfluence.gradients.direction import Direction, LinearFactors
from finfluence.gradients.evaluation import evaluating
from finfluence.gradients.rules import find_rule


def query_gradient(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    measure: Callable[[nn.Module], Tensor],
    *,
    factors: bool = False,
) -> Direction:
    """The gradient of a scalar measurement of the model, leaving the training state untouched.

    The model is in evaluation mode during the call; afterwards every submodule's training flag, every buffer, the
    global random states (CPU and the model's CUDA devices) and every `p.grad` are as before.

    A measurement that is a sum may have a method `parts(model)` beside `__call__`, an iterator of its () terms: each is
    differentiated before the next is computed, which bounds the memory.

    Args:
        model: in whatever mode.
        parameters: name → parameter to differentiate by, all requiring gradients.
        measure: model → () real tensor, with gradients on.
        factors: whether to keep, beside the dense gradient, the factors of each nn.Linear's weight gradient where they
            make projections cheaper (fewer rows than d_in·d_out/(d_in + d_out)).

    Returns:
        ∇m by name; parameters that the measurement does not use are missing.

    Raises:
        InputError: the measurement is not a scalar, not finite, or has no gradient.
    """
    capture = _FactorCapture(model, parameters) if factors else None
    names = list(parameters)
    with suspended(), _evaluation(model), torch.enable_grad():
        try:
            parts = getattr(measure, "parts", None)
            found: dict[str, Tensor] = {}
            for value in [measure(model)] if parts is None else parts(model):
                _check(value)
                gradients = torch.autograd.grad(value, [parameters[n] for n in names], allow_unused=True)
                _accumulate(found, dict(zip(names, gradients, strict=True)))
                del value, gradients  # or its graph would live while the next part is computed
        finally:
            if capture is not None:
                capture.remove()
    _check_finite(found)
    return Direction(found, factors=capture.verified(found) if capture is not None else None)


def _accumulate(total: dict[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        total[name] = gradient if name not in total else total[name] + gradient


def _check_finite(gradients: Mapping[str, Tensor]) -> None:
    sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients.values()]
    if not sums or bool(
        torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums]).sum())
    ):  # one synchronisation for all of them
        return
    broken = next(
        (n for n, s in zip(gradients, sums, strict=True) if not bool(torch.isfinite(s))), next(iter(gradients))
    )
    raise InputError(f"the query's gradient of {broken!r} is not finite; check the query's data or loss for overflow")


def _check(value: object) -> None:
    if not isinstance(value, Tensor) or value.ndim != 0:
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"a query must return a scalar tensor, got {seen}; take the mean over its samples")
    if not value.requires_grad:
        raise InputError(
            "the query's value has no gradient: it was computed under torch.no_grad or detached (.item(), .detach()), "
            "or uses no trainable parameter; return the loss tensor itself"
        )
    if not bool(torch.isfinite(value)):
        raise InputError(
            f"the query's value is {float(value.detach())}; check its data and that the model has not diverged"
        )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with flags, buffers and random states put back afterwards."""
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    ambience = Ambience.capture(devices_of(model), rng=True)
    try:
        with evaluating(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, version, content in buffers:
                if buffer._version != version:
                    buffer.copy_(content)
        ambience.restore_rng()


class _FactorCapture:
    """Collects input and output-gradient rows of every plain Linear while the query runs."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._weights: dict[str, str] = {}
        self._rows: dict[str, list[tuple[Tensor, list[Tensor]]]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, module in model.named_modules():
            if type(module) is nn.Linear and find_rule(module) is not None and id(module.weight) in names:
                self._weights[name] = names[id(module.weight)]
                self._rows[name] = []
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward_hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls = self._rows.get(name)
            if calls is None or not output.requires_grad:
                return
            d_out, d_in = module.weight.shape
            x = args[0].detach().reshape(-1, d_in)
            if (sum(len(rows) for rows, _ in calls) + len(x)) * (d_in + d_out) >= d_in * d_out:
                del self._rows[name]  # the dense form is cheaper
                return
            deltas: list[Tensor] = []
            gradient_target(output).register_hook(lambda delta: deltas.append(delta.detach().reshape(-1, d_out)))
            calls.append((x, deltas))

        return forward_hook

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def verified(self, gradients: Mapping[str, Tensor]) -> dict[str, LinearFactors]:
        """The factors that reproduce the dense gradient; a weight used elsewhere too (tied, functional) has none.

        One random probe v: ‖G v − Δᵀ(X v)‖ against ‖G v‖, which a differing G passes with probability zero.
        """
        result: dict[str, LinearFactors] = {}
        for name, calls in self._rows.items():
            gradient = gradients.get(self._weights[name])
            complete = [(x, deltas[0]) for x, deltas in calls if len(deltas) == 1]
            if gradient is None or not complete:
                continue
            dtype = gradient.dtype
            # The captured input must not have been changed in place since; a copy would cost more than this check.
            x = torch.cat([rows.to(dtype) for rows, _ in complete])
            delta = torch.cat([rows.to(dtype) for _, rows in complete])
            generator = torch.Generator().manual_seed(0)
            probe = torch.randn(x.shape[1], generator=generator).to(x.device, dtype)
            expected, got = gradient @ probe, delta.mT @ (x @ probe)
            tolerance = torch.finfo(min((rows.dtype for _, rows in complete), key=_precision)).eps ** 0.5
            if bool((expected - got).norm() <= tolerance * expected.norm()):
                result[name] = LinearFactors(x, delta)
        return result


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps
