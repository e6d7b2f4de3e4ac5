"""Per-sample directional derivatives: ⟨w_i ∇ℓ_i, q⟩ for every sample of a batch, never the gradients themselves.

Three ways, one result: hooks on the untouched modules inside the user's own backward pass, forward mode through the
vector of losses, and finite differences.
"""

from finfluence.gradients._recording import Recording
from finfluence.gradients.checks import check_model, check_normalisations, normalisations
from finfluence.gradients.derivatives import (
    Method,
    finite_difference_derivatives,
    hooks_derivatives,
    jvp_derivatives,
    per_sample_derivatives,
)
from finfluence.gradients.direction import Direction, LinearFactors
from finfluence.gradients.evaluation import evaluating
from finfluence.gradients.hooks import HookedDerivatives
from finfluence.gradients.query import query_gradient

__all__ = [
    "Direction",
    "HookedDerivatives",
    "LinearFactors",
    "Method",
    "Recording",
    "check_model",
    "check_normalisations",
    "evaluating",
    "finite_difference_derivatives",
    "hooks_derivatives",
    "jvp_derivatives",
    "normalisations",
    "per_sample_derivatives",
    "query_gradient",
]
