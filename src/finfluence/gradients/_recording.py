"""The state of one recorded forward and backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finfluence.gradients._capture import ModuleCall, Output
from finfluence.gradients._layout import Segments
from finfluence.gradients._queries import QueryTable
from finfluence.gradients._replay import Ambience


class Recording:
    """Per-sample contributions of the backward passes within one `record` block.

    Args:
        table: the directions.
        batch_size: samples in the batch, b.
        device: of the accumulator.
        dtype: float32, or float64 in a float64 model.
        segments: where the samples lie if they stand one behind the other, with the length of the whole.
    """

    def __init__(
        self,
        table: QueryTable,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        segments: tuple[Segments, int] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.segments = segments
        self.table = table
        self.sums = torch.zeros(batch_size, len(table), device=device, dtype=dtype)
        self._scale = torch.tensor(table.coefficients, device=device, dtype=dtype)
        self.gradients: dict[str, Tensor] | None = None
        self.open = True
        self.probing = self.partial = False
        self.fired = self.approximate = False
        self.changed = False
        self.coincidence = False
        self.edges: list[Any] = []
        self.calls: list[ModuleCall] = []
        self.undecided: list[tuple[ModuleCall, Output]] = []
        self.entries: dict[nn.Module, list[tuple[Ambience | None, list[int]]]] = {}
        self.completed: set[nn.Module] = set()
        self.keeps: dict[nn.Module, str] = {}
        self.pending: set[tuple[nn.Module, str]] = set()
        self.deferred: dict[str, nn.Module] = {}

    @property
    def values(self) -> Tensor:
        """(b, n_directions): sample i's share of ⟨q_k, the gradient that the backward passes added to p.grad⟩."""
        return self.sums * self._scale

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add (b, *shape) to the samples' own gradients of a parameter, which several modules or calls may share."""
        assert self.gradients is not None
        known = self.gradients.get(name)
        self.gradients[name] = gradient if known is None else known + gradient

    def leave(self, module: nn.Module) -> tuple[Ambience | None, list[int]] | None:
        """What was noted when the module's forward began."""
        stack = self.entries.get(module)
        return stack.pop() if stack else None

    def running(self, module: nn.Module) -> bool:
        """Whether the module's forward has begun and not ended."""
        return bool(self.entries.get(module))

    def forget_graph(self) -> None:
        """Let go of the nodes that the inspection of a forward pass walked."""
        for call, _ in self.undecided:
            call.forget_graph()
        for call in self.calls:
            call.forget_graph()
        self.calls.clear()
        self.undecided.clear()

    def close(self) -> None:
        """Stop recording and let go of everything but the values."""
        self.open = False
        self.edges.clear()
        self.forget_graph()
        self.entries.clear()
