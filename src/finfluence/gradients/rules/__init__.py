"""Closed-form directional derivatives of the common layers, one short file a kind.

A rule gets one call of a module (its input, the gradient δ at its output, the directions of its own parameters) and
returns ⟨δ_i, (∂f/∂W) q⟩ for every sample i and direction k. Rules apply to exact types only:
a subclass may have another forward, and takes the generic path through the module's own forward-mode derivative.
"""

from finfluence.gradients.rules import conv, embedding, linear, norm
from finfluence.gradients.rules._registry import Call, LocalQueries, Rule, find_rule

__all__ = ["Call", "LocalQueries", "Rule", "conv", "embedding", "find_rule", "linear", "norm"]
