"""One recorded forward and backward pass of a training loop that somebody else runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from finfluence.errors import RecordingError
from finfluence.gradients._suspend import is_suspended

# what `Recorder.batch` is opened with: ids and segments, from the model's keyword arguments
Begin = Callable[[tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[Any]]


class MicroBatches:
    """Opens a recorder's batch before the model's forward and closes it when the backward pass has ended.

    The end of a backward pass has no event of its own in other people's loops; a callback that the running backward
    pass itself calls last (as torch's distributed wrappers use) is as early as possible, before any clipping.

    Args:
        model: its forward, in training mode with gradients on, is what a batch is.
        begin: makes the recorder's block from the forward's arguments.
        ended: called with the block's `BatchRecord`, the forward's keyword arguments and its output.
    """

    def __init__(self, model: nn.Module, begin: Begin, ended: Callable[[Any, dict[str, Any], Any], None]) -> None:
        self._begin, self._ended = begin, ended
        self._block: contextlib.ExitStack | None = None
        self._record: Any = None
        self._scheduled = False
        self.expected = False
        self.completed = 0
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    @property
    def running(self) -> bool:
        """Whether a forward has begun whose backward has not ended."""
        return self._block is not None

    def remove(self) -> None:
        """Take the hooks off the model, giving up a batch that is under way."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        block, self._block = self._block, None
        if block is not None:
            error = RecordingError("training was stopped within a batch")
            with contextlib.suppress(Exception):
                block.__exit__(type(error), error, None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.expected or self.running or is_suspended() or not torch.is_grad_enabled() or not model.training:
            return
        block = contextlib.ExitStack()
        self._record = block.enter_context(self._begin(args, kwargs))
        self._block, self._scheduled = block, False

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.running or is_suspended() or not torch.is_grad_enabled():
            return
        self._ended(self._record, kwargs, output)
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        if self.running and not self._scheduled and not is_suspended():
            self._scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def _close(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.close()
            self.completed += 1
