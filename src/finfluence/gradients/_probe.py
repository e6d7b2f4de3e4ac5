"""Evidence from the autograd graph, gathered once, for what shapes and module trees cannot tell.

`uses_outside` finds parameters that are used past the modules that account for them; `sample_gradients` shows which
part of every layer's output one sample's result depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finfluence.gradients._capture import ModuleCall
from finfluence.gradients._layout import Layout, unfolded


def uses_outside(
    outputs: Iterable[Tensor],
    calls: Sequence[ModuleCall],
    boundary: Callable[[ModuleCall], bool],
    names: Mapping[int, str],
) -> set[str]:
    """The parameters that some path of the graph reaches without passing through a module call that accounts for them.

    Args:
        outputs: of the model.
        calls: module calls of this forward pass.
        boundary: whether the search jumps from a call's outputs straight to its inputs.
        names: id(parameter) → name.
    """
    jumps: dict[Any, list[Any]] = {}
    for call in calls:
        if boundary(call):
            for output in call.outputs:
                jumps[output.edge.node] = call.inputs
    found: set[str] = set()
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        following = jumps[node] if node in jumps else [n for n, _ in node.next_functions]
        stack.extend(n for n in following if n is not None)
    return found


def sample_gradients(
    outputs: Sequence[tuple[Tensor, Layout]], edges: Sequence[Any], batch_size: int, *, sample: int
) -> list[Tensor | None] | None:
    """Gradients at places of the graph of a random combination of one sample's results.

    Args:
        outputs: the model's output tensors with their layouts.
        edges: where to take the gradients.
        batch_size: samples in the batch.
        sample: which one.

    Returns:
        One gradient an edge, None where the sample's result does not depend on it; None in all if the graph cannot be
        differentiated twice (re-entrant checkpointing).
    """
    generator = torch.Generator().manual_seed(0)
    weights = []
    for output, layout in outputs:
        weight = torch.zeros_like(output, memory_format=torch.contiguous_format)
        view, batch = unfolded(weight, batch_size, layout)
        part = view.select(batch, sample)
        part.copy_(torch.randn(part.shape, generator=generator))
        weights.append(weight)
    try:
        return list(
            torch.autograd.grad([t for t, _ in outputs], list(edges), weights, retain_graph=True, allow_unused=True)
        )
    except RuntimeError:
        return None
