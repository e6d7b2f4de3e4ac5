"""Reading rules and state out of a torch optimizer that the user built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finfluence.errors import InputError, RecordingError
from finfluence.sensitivity.update_rules import AdamRule, SGDRule, State, UpdateRule

# Options that change the mathematics and that no rule implements. `foreach`, `fused`, `capturable` and
# `differentiable` change only how the same update is computed, so they are accepted.
_UNSUPPORTED = ("maximize", "amsgrad")


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is updated.

    Args:
        rule: Its update rule.
        rate_group: Which learning rate it uses: the index of its param group in the torch optimizer.
    """

    rule: UpdateRule
    rate_group: int = 0


def from_torch(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    *,
    update_rule: UpdateRule | None = None,
) -> dict[str, ParameterRule]:
    """Read the update rule of each named parameter from a torch optimizer.

    Args:
        optimizer: Exactly torch.optim.SGD, Adam or AdamW (a subclass may do anything in its step, so it is refused); or
            any optimizer when `update_rule` is given.
        parameters: Name → the very tensors that the optimizer holds, e.g. `dict(model.named_parameters())`; those that
            do not require gradients may be absent from the optimizer.
        update_rule: The pure update of an optimizer that finfluence does not know; it is used for every parameter.

    Returns:
        Name → rule and learning-rate group, for the parameters that the optimizer updates, in the mapping's order.

    Raises:
        RecordingError: An unknown optimizer, an option without a rule, a parameter that requires gradients but is
            not in the optimizer, or one that the optimizer holds but the mapping does not name.
    """
    if update_rule is None and type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        kind = type(optimizer)
        raise RecordingError(
            f"optimizer {kind.__module__}.{kind.__qualname__} is not supported "
            "(supported: torch.optim.SGD, Adam, AdamW, not their subclasses); "
            "pass update_rule= with an object that implements finfluence.sensitivity.UpdateRule"
        )
    by_id: dict[int, ParameterRule] = {}
    for index, group in enumerate(optimizer.param_groups):
        entry = ParameterRule(_group_rule(optimizer, group) if update_rule is None else update_rule, index)
        for parameter in group["params"]:
            by_id[id(parameter)] = entry
    rules: dict[str, ParameterRule] = {}
    for name, parameter in parameters.items():
        if (entry := by_id.pop(id(parameter), None)) is not None:
            rules[name] = entry
        elif parameter.requires_grad:
            raise RecordingError(
                f"parameter {name} requires gradients but is not in the optimizer; "
                "freeze it with requires_grad_(False) or add it to a param group"
            )
    if by_id:
        raise RecordingError(
            f"the optimizer holds {len(by_id)} parameters that the model does not name; "
            "build it from the same model's parameters"
        )
    if not rules:
        raise RecordingError("the optimizer holds none of the model's parameters; build it from model.parameters()")
    return rules


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The current learning rate of each param group, in order."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def read_state(rule: UpdateRule, entry: Mapping[str, Any], theta: Tensor, *, copy: bool = True) -> tuple[State, int]:
    """Read one parameter's state from a torch optimizer's `state[parameter]`.

    Args:
        rule: The parameter's rule.
        entry: The optimizer's state of that parameter; empty before its first step.
        theta: The parameter, for the shape of buffers that do not exist yet.
        copy: Whether to copy the tensors; without, they are the optimizer's own.

    Returns:
        The rule's state and the number of updates made. SGD does not count its updates: for it the number is
        0 before the first update that a momentum buffer knows of and 1 after it, which is all that its rule
        distinguishes.

    Raises:
        InputError: The entry lacks a tensor that the rule needs.
    """
    if isinstance(rule, SGDRule):
        buffer = entry.get("momentum_buffer")
        if not rule.momentum or buffer is None:
            return rule.init(theta.detach()), 0
        return {"momentum_buffer": buffer.detach().clone() if copy else buffer.detach()}, 1
    step = int(entry["step"]) if "step" in entry else 0
    if step == 0:
        return rule.init(theta.detach()), 0
    keys = list(rule.init(theta.detach().new_zeros(1)))
    if missing := [key for key in keys if not isinstance(entry.get(key), Tensor)]:
        raise InputError(
            f"the optimizer's state lacks {missing} (it has {sorted(entry)}); use the rule of that optimizer"
        )
    return {key: entry[key].detach().clone() if copy else entry[key].detach() for key in keys}, step


def _group_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> UpdateRule:
    for option in _UNSUPPORTED:
        if group.get(option):
            remedy = "negate the loss instead" if option == "maximize" else "use AdamW without it"
            raise RecordingError(f"{type(optimizer).__name__} with {option}=True is not supported; {remedy}")
    if isinstance(optimizer, torch.optim.SGD):
        return SGDRule(
            float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]), bool(group["nesterov"])
        )
    # torch's Adam takes decoupled decay as an option of the group, and its AdamW is Adam with that option set.
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    return AdamRule(
        (float(group["betas"][0]), float(group["betas"][1])),
        float(group["eps"]),
        float(group["weight_decay"]),
        "decoupled" if decoupled else "coupled",
    )
