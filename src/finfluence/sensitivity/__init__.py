"""Sensitivities of a measurement to each step's gradient, live and replayed, through pure optimizer update rules."""

from finfluence.sensitivity.adjoint import AdjointMonitor, generic_vjp, vjp
from finfluence.sensitivity.clipping import ClipDerivative, clip_factor, clip_vjp
from finfluence.sensitivity.flat_update import FlatUpdate, RuleGroup, Settled, States
from finfluence.sensitivity.hvp import (
    EXACT_LIMIT,
    BatchHessian,
    DifferenceHessian,
    ExactHessian,
    HessianMethod,
    batch_hessian,
    difference_step,
    gradient_of,
)
from finfluence.sensitivity.kinks import Kinks, has_kinks
from finfluence.sensitivity.layout import Layout
from finfluence.sensitivity.live import live_direction, live_directions, live_scale
from finfluence.sensitivity.optimizers import SGD, Adam, AdamW, Optimizer, from_dict
from finfluence.sensitivity.torch_optimizers import ParameterRule, from_torch, learning_rates, read_state
from finfluence.sensitivity.update_rules import (
    DEFAULT_DAMPING,
    AdamRule,
    AdjointOptions,
    Pullback,
    SecondMoment,
    SGDRule,
    State,
    UpdateRule,
)

__all__ = [
    "DEFAULT_DAMPING",
    "EXACT_LIMIT",
    "SGD",
    "Adam",
    "AdamRule",
    "AdamW",
    "AdjointMonitor",
    "AdjointOptions",
    "BatchHessian",
    "ClipDerivative",
    "DifferenceHessian",
    "ExactHessian",
    "FlatUpdate",
    "HessianMethod",
    "Kinks",
    "Layout",
    "Optimizer",
    "ParameterRule",
    "Pullback",
    "RuleGroup",
    "SGDRule",
    "SecondMoment",
    "Settled",
    "State",
    "States",
    "UpdateRule",
    "batch_hessian",
    "clip_factor",
    "clip_vjp",
    "difference_step",
    "from_dict",
    "from_torch",
    "generic_vjp",
    "gradient_of",
    "has_kinks",
    "learning_rates",
    "live_direction",
    "live_directions",
    "live_scale",
    "read_state",
    "vjp",
]
