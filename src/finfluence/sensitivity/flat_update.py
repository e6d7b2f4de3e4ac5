"""A whole model's update as one pure function of flat vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finfluence.errors import InputError
from finfluence.sensitivity.adjoint import vjp
from finfluence.sensitivity.layout import Layout
from finfluence.sensitivity.torch_optimizers import ParameterRule, read_state
from finfluence.sensitivity.update_rules import DEFAULT_OPTIONS, AdjointOptions, State, UpdateRule

States = tuple[State, ...]
# what each rule's backward rule is told of the end of the run
Settled = tuple[Tensor | None, ...]
Rates = float | Sequence[float]


@dataclass(frozen=True)
class RuleGroup:
    """Parameters that share a rule and a learning rate: a contiguous slice of the flat vector."""

    rule: UpdateRule
    rate_group: int
    layout: Layout
    start: int

    @property
    def stop(self) -> int:
        """End of the slice."""
        return self.start + self.layout.size


class FlatUpdate:
    """The update of all trainable parameters as a function of one flat vector, for any mixture of rules.

    The vector is ordered by `layout` (rule group by rule group), and the optimizer's state is a tuple of one
    dictionary of flat tensors a group. Every parameter is taken to be updated at every step: a parameter whose
    gradient is missing must be given as zeros, which is what torch does too unless the gradient is None (then torch
    skips its momentum and decay).

    Args:
        parameters: Name → trainable parameter; of one dtype, on one device.
        rules: One rule for all, or a rule for each name (`from_torch`).

    Raises:
        InputError: A parameter has no rule, or dtypes or devices are mixed.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rules: UpdateRule | Mapping[str, ParameterRule]) -> None:
        if not isinstance(rules, Mapping):
            rules = {name: ParameterRule(rules) for name in parameters}
        if missing := [name for name in parameters if name not in rules]:
            raise InputError(f"no update rule for parameter {missing[0]}; give one for each trainable parameter")
        # A list, not a dictionary: a rule of the user's own need not be hashable.
        members: list[tuple[ParameterRule, list[str]]] = []
        for name in parameters:
            for entry, names in members:
                if entry == rules[name]:
                    names.append(name)
                    break
            else:
                members.append((rules[name], [name]))
        self.layout = Layout.of(parameters, [name for _, names in members for name in names])
        groups: list[RuleGroup] = []
        start = 0
        for entry, names in members:
            layout = Layout.of(parameters, names)
            groups.append(RuleGroup(entry.rule, entry.rate_group, layout, start))
            start += layout.size
        self.groups = tuple(groups)

    def init(self, theta: Tensor) -> States:
        """State before the first update, for theta of shape (size,)."""
        return tuple(group.rule.init(theta[group.start : group.stop]) for group in self.groups)

    def update(self, theta: Tensor, state: States, grad: Tensor, *, lr: Rates, step: int) -> tuple[Tensor, States]:
        """One update.

        Args:
            theta: (size,) parameters.
            state: State before the update.
            grad: (size,) gradient as the optimizer receives it.
            lr: The learning rate, or one a rate group (torch's param groups).
            step: Number of updates made before this one.

        Returns:
            New theta (size,) and state.
        """
        if len(self.groups) == 1:
            group = self.groups[0]
            theta, new = group.rule.update(theta, state[0], grad, lr=_rate(lr, group), step=step)
            return theta, (new,)
        results = [
            group.rule.update(
                theta[group.start : group.stop], own, grad[group.start : group.stop], lr=_rate(lr, group), step=step
            )
            for group, own in zip(self.groups, state, strict=True)
        ]
        return torch.cat([result[0] for result in results]), tuple(result[1] for result in results)

    def vjp(
        self,
        theta: Tensor,
        state: States,
        grad: Tensor,
        lambda_theta: Tensor,
        lambda_state: States | None,
        *,
        lr: Rates,
        step: int,
        options: AdjointOptions = DEFAULT_OPTIONS,
        settled: Settled | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, States, Tensor]:
        """Pull derivatives back through one update, as `adjoint.vjp`, for the whole vector.

        Args:
            theta: (size,) parameters before the update.
            state: State before the update.
            grad: (size,) gradient that the optimizer received.
            lambda_theta: (..., size) dm/dtheta after the update; leading axes are queries.
            lambda_state: dm/dstate after the update; None at the end of the run.
            lr: The learning rate, or one a rate group.
            step: Number of updates made before this one.
            options: Damping and treatment of the second moment.
            settled: From `settled`; None for none.
            overwrite: Whether the results may be written over `lambda_theta` and `lambda_state`.

        Returns:
            dm/dtheta through the update alone (..., size), dm/dstate, and the sensitivity q (..., size).
        """
        lambda_state = ({},) * len(self.groups) if lambda_state is None else lambda_state
        settled = (None,) * len(self.groups) if settled is None else settled
        if len(self.groups) == 1:
            group = self.groups[0]
            back = vjp(
                group.rule,
                theta,
                state[0],
                grad,
                lambda_theta,
                lambda_state[0],
                lr=_rate(lr, group),
                step=step,
                options=options,
                layout=group.layout,
                settled=settled[0],
                overwrite=overwrite,
            )
            return back.theta, (back.state,), back.q
        parts = [
            vjp(
                group.rule,
                theta[group.start : group.stop],
                own,
                grad[group.start : group.stop],
                lambda_theta[..., group.start : group.stop],
                own_lambda,
                lr=_rate(lr, group),
                step=step,
                options=options,
                layout=group.layout,
                settled=own_settled,
                overwrite=overwrite,
            )
            for group, own, own_lambda, own_settled in zip(self.groups, state, lambda_state, settled, strict=True)
        ]
        return (
            torch.cat([part.theta for part in parts], dim=-1),
            tuple(part.state for part in parts),
            torch.cat([part.q for part in parts], dim=-1),
        )

    @property
    def adaptive(self) -> bool:
        """Whether a rule divides by a second moment, as Adam's does."""
        return any(hasattr(group.rule, "settled") for group in self.groups)

    def settled(self, state: States, step: int) -> Settled:
        """What each rule group's backward rule wants to know of the end of the run.

        Args:
            state: After the run's last update.
            step: Number of updates that the run made.
        """
        if not step:
            return (None,) * len(self.groups)
        rules = [getattr(group.rule, "settled", None) for group in self.groups]
        return tuple(None if rule is None else rule(own, step) for rule, own in zip(rules, state, strict=True))

    def read_state(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], *, out: States | None = None
    ) -> tuple[States, int]:
        """Copy a torch optimizer's state into this update's form.

        Args:
            optimizer: The optimizer that holds the parameters.
            parameters: Name → the tensors that the optimizer holds.
            out: A state of this update to be filled and returned; a new one by default.

        Returns:
            The state, and the number of updates made (see `read_state` of a single parameter about SGD).

        Raises:
            InputError: Parameters of this update have made different numbers of updates.
        """
        states: list[State] = []
        steps: dict[int, str] = {}
        for index, group in enumerate(self.groups):
            read: dict[str, State] = {}
            for name in group.layout.names:
                entry: Mapping[str, Any] = optimizer.state.get(parameters[name], {})
                read[name], step = read_state(group.rule, entry, parameters[name], copy=False)
                steps.setdefault(step, name)
            keys = read[group.layout.names[0]]
            into: State = {} if out is None else out[index]
            states.append(
                {
                    key: group.layout.flatten({name: own[key] for name, own in read.items()}, out=into.get(key))
                    for key in keys
                }
            )
        if len(steps) > 1:
            raise InputError(
                f"parameters have made different numbers of updates: {dict(sorted(steps.items()))}; "
                "give every parameter a gradient at every step (zeros where the loss does not use it)"
            )
        return tuple(states), next(iter(steps))


def _rate(lr: Rates, group: RuleGroup) -> float:
    return float(lr) if isinstance(lr, int | float) else float(lr[group.rate_group])
