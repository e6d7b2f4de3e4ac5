"""Live sensitivities: what a step does to the measurement if nothing happens after it (f-INE, TracIn, LESS)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finfluence.errors import InputError
from finfluence.sensitivity.adjoint import vjp
from finfluence.sensitivity.torch_optimizers import ParameterRule
from finfluence.sensitivity.update_rules import UpdateRule

_CHUNK_BYTES = 1 << 26  # of parameters that are done together: two or three times as much is held beside the result


def live_direction(
    rule: UpdateRule,
    state: Mapping[str, Any],
    query_gradient: Tensor,
    *,
    lr: float,
    step: int | None = None,
    theta: Tensor | None = None,
) -> Tensor:
    """q_t = (dU_t/dgrad_t)ᵀ ∇m(theta_t), elementwise through the optimizer's own preconditioner.

    - SGD: −lr · ∇m; with momentum −lr·(1 − dampening)·∇m; Nesterov −lr·(1 + momentum)·∇m.
    - Adam, AdamW: −lr · (1 − β1)/(1 − β1^t) / (sqrt(v_hat) + eps) · ∇m with t = step + 1 and v_hat as it stood
      *before* the step, because grad_t is not known yet when the batch's backward pass begins.

    At Adam's first step there is no second moment, and the step is a sign, whose derivative is zero: q_0 = 0. The same
    holds later for every element with v = 0, e.g. the embedding of a token that training has not seen.

    Args:
        rule: The parameter's update rule.
        state: Its state before the step: a rule's own, or a torch optimizer's `state[parameter]` (may be empty before
            the first).
        query_gradient: ∇m(theta_t), (..., *shape).
        lr: The learning rate of this step.
        step: Number of updates already made; read from `state["step"]` by default (for SGD: from the momentum buffer's
            existence).
        theta: The parameter, (*shape); needed only for a rule without `live`, which is differentiated at a zero
            gradient.

    Returns:
        q_t, (..., *shape).

    Raises:
        InputError: `step` is absent and `state` does not hold it, or a rule without `live` is given no `theta`.
    """
    if step is None:
        step = _updates_made(rule, state)
    with torch.no_grad():
        if (closed_form := getattr(rule, "live", None)) is not None:
            return closed_form(state, query_gradient, lr=lr, step=step)
    if theta is None:
        raise InputError(f"rule {type(rule).__name__} has no live method; pass theta= to differentiate its update")
    own_state = {key: state.get(key, value) for key, value in rule.init(theta).items()}
    return vjp(rule, theta, own_state, torch.zeros_like(theta), query_gradient, {}, lr=lr, step=step).q


def live_directions(
    rules: Mapping[str, ParameterRule],
    states: Mapping[str, Mapping[str, Any]],
    query_gradients: Mapping[str, Tensor],
    *,
    rates: Sequence[float],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """`live_direction` of many parameters; those of one rule are done together where it has `live_each`.

    A small model's time goes into launching operations, and LoRA's hundreds of small matrices are launched as one.

    Args:
        rules: The rule of each parameter.
        states: The state of each before the step, as for `live_direction`.
        query_gradients: ∇m(theta_t) by name, (*shape).
        rates: Learning rate of each group of the optimizer.
        parameters: By name.

    Returns:
        q_t by name, in the order of `query_gradients`.
    """
    made = _updates_made_of(rules, states, list(query_gradients))
    together: dict[Any, list[str]] = {}
    found: dict[str, Tensor] = {}
    for name, gradient in query_gradients.items():
        entry = rules[name]
        if hasattr(entry.rule, "live_each"):
            kind = (id(entry.rule), rates[entry.rate_group], made[name], gradient.dtype, gradient.device)
            together.setdefault(kind, []).append(name)
        else:
            theta, state = parameters[name].detach(), states[name]
            found[name] = live_direction(entry.rule, state, gradient, lr=rates[entry.rate_group], theta=theta)
    for (_, lr, step, _, _), names in together.items():
        rule: Any = rules[names[0]].rule
        for part in _chunks(names, query_gradients):
            with torch.no_grad():
                gradients = [query_gradients[name] for name in part]
                found |= zip(part, rule.live_each([states[n] for n in part], gradients, lr=lr, step=step), strict=True)
    return {name: found[name] for name in query_gradients}


def _chunks(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        if part and held + size > _CHUNK_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


def live_scale(rule: UpdateRule, lr: float, *, step: int = 1) -> float | None:
    """The scalar s with q_t = s · ∇m(theta_t) of rules that have one (SGD): factored query gradients stay factored.

    Args:
        rule: The update rule.
        lr: The learning rate of this step.
        step: Number of updates already made; only 0 or not matters (the first step of momentum SGD is not dampened).

    Returns:
        The scalar, or None for a rule with a preconditioner.
    """
    scale = getattr(rule, "live_scale", None)
    return None if scale is None else scale(lr, step=step)


def _updates_made_of(
    rules: Mapping[str, ParameterRule], states: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> dict[str, int]:
    """Updates already made, by name. Counters on a GPU (fused optimizers) are read together: each read is a wait."""
    counters = {name: states[name].get("step") for name in names}
    away = {name: c.reshape(()) for name, c in counters.items() if isinstance(c, Tensor) and c.device.type != "cpu"}
    counted: dict[str, Any] = dict(zip(away, torch.stack(list(away.values())).tolist(), strict=True)) if away else {}
    return {
        name: int(counted[name]) if name in counted else _updates_made(rules[name].rule, states[name]) for name in names
    }


def _updates_made(rule: UpdateRule, state: Mapping[str, Any]) -> int:
    if "step" in state:
        return int(state["step"])
    if hasattr(rule, "live_scale"):
        return 0 if state.get("momentum_buffer") is None else 1
    if not state:
        return 0
    raise InputError("the state does not count its steps; pass step= with the number of updates already made")
