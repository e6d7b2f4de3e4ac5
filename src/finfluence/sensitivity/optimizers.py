"""Optimizer configurations: validated, JSON-serialisable, buildable as a torch optimizer and as a pure update rule."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from finfluence.errors import InputError
from finfluence.sensitivity.update_rules import AdamRule, SGDRule


def _require(name: str, value: object, *, below: float | None = None) -> None:
    """Accept a finite number >= 0, and smaller than `below` where that is given."""
    bound = ">= 0" if below is None else f"in [0, {below:g})"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not isfinite(value)
        or value < 0
        or (below is not None and value >= below)
    ):
        raise InputError(f"{name} is {value!r}; give a finite number {bound}")


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as torch.optim.SGD.

    Args:
        lr: Learning rate (the schedule's base).
        momentum: Momentum in [0, 1).
        dampening: Dampening of the gradient that enters the momentum buffer.
        weight_decay: Coupled decay, added to the gradient.
        nesterov: Nesterov momentum; needs momentum > 0 and no dampening.

    Raises:
        InputError: A value is out of range.
    """

    name: ClassVar[str] = "sgd"

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _require("lr", self.lr)
        _require("momentum", self.momentum, below=1.0)
        _require("weight_decay", self.weight_decay)
        _require("dampening", self.dampening)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise InputError(
                f"nesterov with momentum {self.momentum!r} and dampening {self.dampening!r}; "
                "set momentum > 0 and dampening = 0, or nesterov=False"
            )

    @property
    def rule(self) -> SGDRule:
        """The pure update rule."""
        return SGDRule(self.momentum, self.dampening, self.weight_decay, self.nesterov)

    def build(self, params: Iterable[Tensor]) -> torch.optim.SGD:
        """The torch optimizer over `params`."""
        return torch.optim.SGD(params, **asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` reads it back."""
        return _as_dict(self)


@dataclass(frozen=True)
class Adam:
    """Adam with coupled weight decay, as torch.optim.Adam (Kingma and Ba 2015).

    Args:
        lr: Learning rate (the schedule's base).
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Coupled decay, added to the gradient.

    Raises:
        InputError: A value is out of range.
    """

    name: ClassVar[str] = "adam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_adam(self)

    @property
    def rule(self) -> AdamRule:
        """The pure update rule."""
        return AdamRule(self.betas, self.eps, self.weight_decay, "coupled")

    def build(self, params: Iterable[Tensor]) -> torch.optim.Adam:
        """The torch optimizer over `params`."""
        return torch.optim.Adam(params, **asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` reads it back."""
        return _as_dict(self)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW (Loshchilov and Hutter 2019).

    Args:
        lr: Learning rate (the schedule's base).
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled decay; each step multiplies the parameters by 1 − lr · weight_decay.

    Raises:
        InputError: A value is out of range.
    """

    name: ClassVar[str] = "adamw"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check_adam(self)

    @property
    def rule(self) -> AdamRule:
        """The pure update rule."""
        return AdamRule(self.betas, self.eps, self.weight_decay, "decoupled")

    def build(self, params: Iterable[Tensor]) -> torch.optim.AdamW:
        """The torch optimizer over `params`."""
        return torch.optim.AdamW(params, **asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` reads it back."""
        return _as_dict(self)


Optimizer = SGD | Adam | AdamW
_KINDS: dict[str, type[SGD] | type[Adam] | type[AdamW]] = {kind.name: kind for kind in (SGD, Adam, AdamW)}


def from_dict(description: Mapping[str, Any]) -> Optimizer:
    """Rebuild an optimizer configuration from `as_dict`, e.g. after JSON.

    Args:
        description: `{"name": "sgd" | "adam" | "adamw", ...}` with the configuration's own fields.

    Returns:
        The configuration.

    Raises:
        InputError: The name or a field is unknown, a required field is missing, or a value is out of range.
    """
    values = dict(description)
    name = values.pop("name", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"optimizer name is {name!r}; choose one of {sorted(_KINDS)}")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise InputError(f"optimizer {name} has no option {', '.join(unknown)}; its options are {sorted(known)}")
    if kind is SGD and "lr" not in values:
        raise InputError("optimizer sgd needs lr; add it")
    if isinstance(values.get("betas"), list):
        values["betas"] = tuple(values["betas"])
    return kind(**values)


def _as_dict(optimizer: Optimizer) -> dict[str, Any]:
    values = asdict(optimizer)
    if "betas" in values:
        values["betas"] = list(values["betas"])
    return {"name": optimizer.name, **values}


def _check_adam(optimizer: "Adam | AdamW") -> None:
    _require("lr", optimizer.lr)
    betas = cast(object, optimizer.betas)
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise InputError(f"betas is {betas!r}; give a tuple of two numbers, e.g. (0.9, 0.999)")
    for index, beta in enumerate(betas):
        _require(f"betas[{index}]", beta, below=1.0)
    _require("eps", optimizer.eps)
    _require("weight_decay", optimizer.weight_decay)
