"""What one module call leaves behind for its backward pass, without keeping anything alive that autograd would not.

Inputs are saved by a small autograd node beside the graph: saved-tensor hooks see them (gradient checkpointing drops
and recomputes them, offloading moves them), and autograd's own version counter notices a change in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from finfluence.errors import RecordingError
from finfluence.gradients._layout import Layout
from finfluence.gradients._replay import Ambience


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)


class Kept:
    """A nested structure whose tensors autograd holds for us.

    Args:
        tree: any pytree; leaves that are not tensors are held directly.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self._spec = pytree.tree_flatten(tree)
        self._tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with torch.enable_grad():
            anchor = torch.zeros((), requires_grad=True)
            # The node's output is held, not the node: before PyTorch 2.13 a node lived only as long as its output.
            self._output: Any = _Keep.apply(anchor, *(leaves[i] for i in self._tensors))

    def load(self, what: str) -> Any:
        """The structure, with detached tensors.

        Args:
            what: names the module in the error.

        Raises:
            RecordingError: a tensor was modified in place since.
        """
        try:
            saved = self._output.grad_fn.saved_tensors
        except RuntimeError as error:
            _explain(error, what)
            raise
        leaves = list(self._others)
        for i, tensor in zip(self._tensors, saved, strict=True):
            leaves[i] = tensor.detach()
        return pytree.tree_unflatten(leaves, self._spec)


class Borrowed:
    """A matmul's input as autograd itself keeps it for the weight's gradient: no copy, no memory of our own.

    Args:
        node: of the product in the autograd graph.
        shape: of the input.
    """

    def __init__(self, node: Any, shape: torch.Size) -> None:
        self._node, self._shape = node, shape

    @classmethod
    def of(cls, x: Tensor, output: Tensor) -> Borrowed | None:
        """The input x of a product without bias, cast or not; None where autograd does not surely hold it.

        Saved-tensor hooks (gradient checkpointing) let a tensor be read once only, and that once is autograd's.
        """
        hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
        if hooks is None or hooks(True) is not None:
            return None
        reshaped = output.grad_fn
        if reshaped is None or reshaped.name() != "UnsafeViewBackward0":
            return None  # the hook would then hang on the product itself, and hold on to its own node
        node = reshaped.next_functions[0][0]
        if node is None or node.name() != "MmBackward0":
            return None
        saved = node._saved_self  # pyright: ignore[reportAttributeAccessIssue]
        rows = x.shape.numel() // x.shape[-1]
        if saved is None or saved.shape != (rows, x.shape[-1]) or saved.dtype != output.dtype:
            return None
        return cls(node, x.shape)

    def load(self, what: str) -> Tensor:
        """The detached input.

        Raises:
            RecordingError: it was modified in place since.
        """
        try:
            return self._node._saved_self.detach().view(self._shape)
        except RuntimeError as error:
            _explain(error, what)
            raise


def _explain(error: RuntimeError, what: str) -> None:
    if "inplace operation" in str(error):
        raise RecordingError(
            f"the input of {what} was modified in place after the module ran; "
            "use the out-of-place form of that operation, or method='jvp'"
        ) from error


@dataclass
class Output:
    """One output tensor of a call that has a gradient.

    Args:
        index: its number among the call's output tensors.
        shape: its shape.
        edge: its place in the autograd graph.
        options: layouts that its shape admits, the likeliest first.
        layout: the one in force; None if there is none.
        decided: whether more than the shape speaks for it.
    """

    index: int
    shape: torch.Size
    edge: Any
    options: list[Layout]
    layout: Layout | None
    decided: bool


@dataclass
class ModuleCall:
    """One call of an owning module within a record.

    Args:
        module: that was called.
        outputs: its output tensors that have a gradient.
        inputs: autograd nodes of its input tensors, for the search for uses outside of it.
        kept: input of a rule, or (args, kwargs) for the generic path; None where nothing is needed.
        ambience: random states and autocast, for the generic path.
        checksum: per output, sums that a second run must reproduce; None where not checked.
    """

    module: nn.Module
    outputs: list[Output]
    inputs: list[Any] = field(default_factory=list)
    kept: Kept | Borrowed | None = None
    ambience: Ambience | None = None
    checksum: list[Tensor] | None = None

    def release(self) -> None:
        """Drop everything that holds memory."""
        self.kept, self.ambience, self.checksum = None, None, None
        self.forget_graph()

    def forget_graph(self) -> None:
        """Drop references to the autograd graph."""
        self.inputs = []
        for output in self.outputs:
            output.edge = None


def gradient_target(output: Tensor) -> Tensor:
    """The tensor whose hook sees the output's gradient even if the output is then modified in place.

    nn.Linear's output for (b, t, d) is a reshaped view; an in-place operation on a view moves it to another node of the
    graph, while the node of its base stays.
    """
    base = output._base if output._is_view() else None
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def on_gradients(outputs: list[Tensor], receive: Callable[[list[Tensor | None]], None]) -> None:
    """Call `receive` once a backward pass has the gradients of all outputs, as they come; see `in_shapes`.

    Nothing is done to them here: hooks also run in a later double backward, where gradients may be batched (vmap) and
    refuse most operations.
    """
    targets = [gradient_target(t) for t in outputs]
    if len(targets) == 1:
        targets[0].register_hook(lambda delta: receive([delta]))
        return
    torch.autograd.graph.register_multi_grad_hook(targets, lambda deltas: receive(list(deltas)))


def in_shapes(deltas: list[Tensor | None], outputs: list[Output]) -> list[Tensor | None]:
    """The gradients that a hook received, detached and in the outputs' shapes."""
    detached = [d.detach() if d is not None and d.requires_grad else d for d in deltas]
    return [
        d if d is None or d.shape == o.shape else d.reshape(o.shape) for d, o in zip(detached, outputs, strict=True)
    ]


def graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph, so that it may be run again."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
