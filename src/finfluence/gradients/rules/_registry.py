"""The registry of layer rules and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finfluence.gradients._layout import Layout, Segments, sum_to_samples, unfolded


class LocalQueries(Protocol):
    """The directions of one module's own parameters."""

    def dense(self, name: str, *, dtype: torch.dtype) -> list[tuple[list[int], Tensor]]:
        """Groups (direction numbers, (k, *shape) stacked tensors) of the directions dense in this parameter."""
        ...

    def factored(self, *, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor, Tensor] | None:
        """Direction numbers, X (r, d_in), Δ (r, d_out) and membership (r, k) of the factored weight directions."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of a module, seen from its backward pass.

    Args:
        module: the layer; a rule reads its hyper-parameters only.
        input: its input, None if the rule said that it needs none.
        delta: gradient at its output, in the output's shape.
        layout: where the samples lie in the output.
        batch_size: b.
        queries: the directions of the layer's own parameters.
        values: (b, n_directions) accumulator that the rule adds to.
    """

    module: Any
    input: Tensor | None
    delta: Tensor
    layout: Layout
    batch_size: int
    queries: LocalQueries
    values: Tensor

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of the sums: float32, or float64 in a float64 model."""
        return self.values.dtype

    @property
    def source(self) -> Tensor:
        """The captured input of a rule that needs one."""
        assert self.input is not None
        return self.input

    def samples(self, tensor: Tensor, *, keep: int = 0) -> Tensor:
        """Sum a tensor that is shaped like the output to (b, *last `keep` dimensions), in the accumulator's dtype."""
        return sum_to_samples(tensor, self.batch_size, self.layout, keep=keep, dtype=self.accumulate)

    def rows_to_samples(self, products: Tensor) -> Tensor:
        """Sum (k, n, features) over each sample's rows and all features to (b, k), in the accumulator's dtype.

        The n rows are the output's leading dimensions, flattened.
        """
        alone = self.batch_size == 1 and not isinstance(self.layout, Segments)
        if alone or self.layout in (0, "batch-major"):  # a sample's rows lie together
            return products.view(len(products), self.batch_size, -1).sum(-1, dtype=self.accumulate).mT
        per_row = products.sum(-1, dtype=self.accumulate).mT
        return self.samples(per_row.unflatten(0, self.delta.shape[:-1]), keep=1)

    def by_sample(self, tensor: Tensor, *, keep: int) -> Tensor:
        """(b, rows of the sample, *last `keep` dimensions) of a tensor whose leading dimensions are the output's.

        Raises:
            NotImplementedError: samples of different lengths stand one behind the other.
        """
        if isinstance(self.layout, Segments):
            raise NotImplementedError("samples of different lengths in one row")
        kept = tensor.shape[tensor.ndim - keep :]
        if self.batch_size > 1:
            tensor, batch = unfolded(tensor, self.batch_size, self.layout)
            tensor = tensor.movedim(batch, 0)
        return tensor.reshape(self.batch_size, -1, *kept)

    def add(self, directions: list[int], contribution: Tensor) -> None:
        """Add (b, len(directions)) to the accumulator's columns."""
        if contribution.device != self.values.device or contribution.dtype != self.values.dtype:
            contribution = contribution.to(self.values.device, self.values.dtype)
        if len(directions) == self.values.shape[1]:
            self.values.add_(contribution)
        else:
            index = torch.tensor(directions, device=self.values.device)
            self.values.index_add_(1, index, contribution)

    def add_affine(self, name: str, per_sample: Tensor) -> None:
        """Add ⟨s_i, q_k⟩ for a parameter whose per-sample gradient s, (b, *shape), is cheap (biases, norms)."""
        for directions, stacked in self.queries.dense(name, dtype=self.accumulate):
            self.add(directions, per_sample.flatten(1) @ stacked.flatten(1).mT)


@dataclass(frozen=True)
class Rule:
    """A layer kind's closed form.

    Args:
        compute: adds the call's contributions to its accumulator.
        parameters: the names that it covers; a module with others takes the generic path.
        needs_input: names whose contribution needs the layer's input.
        feature_dims: trailing dimensions of the output that are not the batch, by module and dimensions of the output.
        matmul: whether autocast runs the layer in low precision.
        gradients: the samples' own gradients, (b, *shape) by the layer's local names, in the accumulator's dtype; None
            where there is no closed form that is small enough.
    """

    compute: Callable[[Call], None]
    parameters: frozenset[str]
    needs_input: frozenset[str]
    feature_dims: Callable[[Any, int], int]
    matmul: bool
    gradients: Callable[[Call], dict[str, Tensor]] | None = None


_RULES: dict[type[nn.Module], Rule] = {}


def register(
    *kinds: type[nn.Module],
    needs_input: Iterable[str],
    feature_dims: Callable[[Any, int], int],
    parameters: Iterable[str] = ("weight", "bias"),
    matmul: bool = False,
) -> Callable[[Callable[[Call], None]], Callable[[Call], None]]:
    """Register a function as the rule of some exact module types."""

    def decorate(compute: Callable[[Call], None]) -> Callable[[Call], None]:
        for kind in kinds:
            _RULES[kind] = Rule(compute, frozenset(parameters), frozenset(needs_input), feature_dims, matmul)
        return compute

    return decorate


def register_gradients(
    *kinds: type[nn.Module],
) -> Callable[[Callable[[Call], dict[str, Tensor]]], Callable[[Call], dict[str, Tensor]]]:
    """Add the samples' own gradients to the rule of some module types."""

    def decorate(gradients: Callable[[Call], dict[str, Tensor]]) -> Callable[[Call], dict[str, Tensor]]:
        for kind in kinds:
            _RULES[kind] = replace(_RULES[kind], gradients=gradients)
        return gradients

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The closed form for a module, None if it must take the generic path.

    Exact type only, and not where the instance's own forward was replaced or a re-parametrisation computes its weight.
    """
    rule = _RULES.get(type(module))
    if rule is None or "forward" in module.__dict__:
        return None
    own = {name for name, p in module._parameters.items() if p is not None}
    return rule if own <= rule.parameters else None
