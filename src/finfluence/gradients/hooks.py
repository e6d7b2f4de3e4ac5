"""Per-sample directional derivatives from hooks on untouched modules, inside the user's own backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finfluence.errors import InputError, RecordingError
from finfluence.gradients import _layout as layouts
from finfluence.gradients._capture import Borrowed, Kept, ModuleCall, Output, gradient_target, in_shapes, on_gradients
from finfluence.gradients._contribution import contribute, signatures
from finfluence.gradients._discovery import Discovery
from finfluence.gradients._plan import Plan
from finfluence.gradients._queries import QueryTable
from finfluence.gradients._recording import Recording
from finfluence.gradients._replay import Ambience, devices_of, tensors_in
from finfluence.gradients._suspend import is_suspended
from finfluence.gradients.checks import check_model
from finfluence.gradients.direction import Direction


class HookedDerivatives:
    """Records ⟨q_k, w_i ∇ℓ_i⟩ for every sample of a batch while the user's loss runs forward and backward.

    For a module y = f(x; W) with output gradient δ the contribution of sample i is ⟨δ_i, (∂f/∂W) q⟩_i: closed forms
    for common layers, the module's own forward-mode derivative otherwise. The weights w_i are whatever the loss made
    them: mean, sum, sample weights, AMP's scale.

    Hooks do nothing outside of `record`, and never change a value of the training step. Derivatives that the model's
    forward itself takes (gradient penalties) are not supported.

    Attributes:
        low_precision: whether a gradient of 16 bits was seen (autocast, or a model of that type), or a module had to be
            differentiated by finite differences.

    Args:
        model: left as it is; forward and forward-pre hooks are registered on the modules that have recorded parameters.
        parameters: name → parameter to account for, named as in `dict(model.named_parameters())`; those that do not
            require gradients are skipped.
        batch_dim: the dimension of layers' outputs that is the batch, or "auto": dimension 0 if it has the batch's
            size, else 1, else rows folded from (b, t). Where sizes coincide, one extra backward pass in the first
            record finds out which is right.

    Raises:
        RecordingError: the model couples samples (see `check_model`), or does not hold a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_dim: Literal["auto"] | int = "auto",
    ) -> None:
        if batch_dim != "auto" and (not isinstance(batch_dim, int) or batch_dim < 0):
            raise InputError(f"batch_dim is {batch_dim!r}; give 'auto' or a dimension counted from 0")
        check_model(model)
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self._parameters:
            raise RecordingError("0 trainable parameters to record; check requires_grad of the model's parameters")
        self._plan = Plan(model, self._parameters)
        self._discovery = Discovery(self._plan, self._parameters)
        self._batch_dim = None if batch_dim == "auto" else batch_dim
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._dtype = torch.promote_types(
            torch.float32, max((p.dtype for p in self._parameters.values()), key=lambda d: d.itemsize)
        )
        self._device = next(iter(self._parameters.values())).device
        self._devices = devices_of(model)
        self._table: QueryTable | None = None
        self._record: Recording | None = None
        self._covered: set[str] = set()
        self._recomputes = False
        self.low_precision = False
        self._handles = []
        for module in self._plan.watched():
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def record(
        self,
        directions: Sequence[Direction],
        batch_size: int,
        *,
        segments: tuple[Sequence[int], int] | None = None,
        partial: bool = False,
    ) -> Iterator[Recording]:
        """Record the forward and backward passes that run in the block; both must.

        Args:
            directions: q_k, over the recorded parameters.
            batch_size: samples in the batch, b.
            segments: for samples that stand one behind the other in one row (padding-free batches): the (b,) lengths
                and the length of the row; None where samples have a dimension.
            partial: whether the backward pass will be `backward`'s.

        Returns:
            The recording; its `values`, (b, n_directions), are complete when the block ends.

        Raises:
            RecordingError: no backward pass of a recorded forward ran, or a layer's samples cannot be told apart.
        """
        if not directions:
            raise InputError("0 directions to record; pass at least one")
        if self._table is not None and self._table.matches(directions):
            table = self._table.rescaled(directions)
        else:
            table = self._table = QueryTable(directions, self._shapes)
        if segments is not None and (len(segments[0]) != batch_size or sum(segments[0]) > segments[1]):
            raise InputError(
                f"segments of lengths {list(segments[0])[:5]}… do not make {batch_size} samples in a row of "
                f"{segments[1]}; give each sample's length, in order"
            )
        placed = None if segments is None else (layouts.Segments(tuple(segments[0])), segments[1])
        record = Recording(table, batch_size=batch_size, device=self._device, dtype=self._dtype, segments=placed)
        record.partial = partial
        with self._running(record):
            yield record

    @contextmanager
    def record_gradients(self, batch_size: int) -> Iterator[Recording]:
        """Record the samples' own gradients while a loss runs forward and, by `backward`, backward in the block.

        Args:
            batch_size: samples in the batch, b.

        Returns:
            The recording; its `gradients`, (b, *shape) by parameter, are complete when the block ends. A parameter that
            the loss does not reach is missing.

        Raises:
            RecordingError: as of `record`, or a module without a closed form (convolutions, layers of the user's own).
            NotImplementedError: a layer's samples do not stand in rows of their own.
        """
        record = Recording(QueryTable([], self._shapes), batch_size=batch_size, device=self._device, dtype=self._dtype)
        record.partial, record.gradients = True, {}
        with self._running(record):
            yield record

    @contextmanager
    def _running(self, record: Recording) -> Iterator[None]:
        if record.batch_size < 1:
            raise InputError(f"batch_size is {record.batch_size}; it must be at least 1")
        if self._record is not None:
            raise RecordingError("a recording is already running on this model; end it before starting another")
        if not self._handles:
            raise RecordingError("the hooks were removed from the model; make a new HookedDerivatives")
        self._record = record
        try:
            yield
            self._discovery.finish(record)
            if not record.fired:
                raise RecordingError(
                    "no gradient passed through a recorded module; run both the forward and the backward pass in the "
                    "record block, on the model that was given"
                )
        finally:
            self._record = None
            self._discovery.apply_deferred(record)
            record.close()

    def backward(self, loss: Tensor) -> None:
        """Run a recorded loss's backward pass as far as the record needs it; p.grad stays as it is.

        The values need the gradients of the layers' outputs alone. Those of the weights, a third of the work in the
        backward pass of a linear layer, are left out once a record has shown that the layers run in the model's forward
        and not again in the backward pass (gradient checkpointing).

        Args:
            loss: a scalar, computed in the record block.

        Raises:
            RecordingError: no recording is running that was told so.
        """
        if self._record is None or not self._record.partial:
            raise RecordingError("no recording is running; call backward in a record(..., partial=True) block")
        partial = self._discovery.settled and not self._recomputes
        ends = self._record.edges if partial and self._record.edges else list(self._parameters.values())
        torch.autograd.grad(loss, ends, allow_unused=True)

    def uncovered(self) -> list[str]:
        """Names of parameters that have a gradient now, and to which no recording so far ascribed any of it."""
        return [
            name
            for name, p in self._parameters.items()
            if name not in self._covered and p.grad is not None and bool(p.grad.any() if not p.grad.is_sparse else True)
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = self._record
        if record is None or is_suspended() or not torch.is_grad_enabled():
            return
        generic = module in self._plan.owned and self._plan.rules[module] is None
        ambience, versions = None, []
        if generic or not self._discovery.settled:
            ambience = Ambience.capture(self._devices, rng=module.training)
            versions = [t._version for t in tensors_in((args, kwargs))]
        record.entries.setdefault(module, []).append((ambience, versions))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record = self._record
        if record is None or is_suspended() or not torch.is_grad_enabled():
            return
        entry = record.leave(module)
        if module is self._plan.model:
            self._discovery.inspect(record, output, (args, kwargs), batch_dim=self._batch_dim)
        if self._plan.owned.get(module) or module in record.keeps:
            self._capture(record, module, args, kwargs, output, entry)
        record.completed.add(module)

    def _capture(self, record: Recording, module: nn.Module, args: Any, kwargs: Any, output: Any, entry: Any) -> None:
        rule = self._plan.rules[module]
        owned = self._plan.owned[module]
        tensors = tensors_in(output)
        found = [(i, t) for i, t in enumerate(tensors) if t.requires_grad]
        if not found:
            return
        outputs = [self._output(record, module, i, t) for i, t in found]
        if all(o.layout is None for o in outputs) and owned:
            self._discovery.lift(record, module, [o.shape for o in outputs])
            return
        mode = record.keeps.get(module) or (
            "call" if rule is None else "input" if rule.needs_input & set(owned) else ""
        )
        record.keeps[module] = mode
        call = ModuleCall(module, outputs)
        known = self._discovery.settled and all(o.decided for o in outputs)
        sources = [] if known and mode != "call" else tensors_in((args, kwargs))
        if mode == "input":
            matmul = rule is not None and rule.matmul
            call.kept = _matmul_input(_first_input(args, kwargs), found[0][1], matmul=matmul)
        elif mode == "call":
            call.kept, call.ambience = Kept((args, kwargs)), self._discovery.ambience(module, entry, sources)
            if not self._discovery.settled:
                call.checksum = signatures([t for _, t in found])
        if not known:
            record.coincidence |= any(
                layouts.coincides(t.shape, record.batch_size) for t in (*sources, *(t for _, t in found))
            )
        if record.running(self._plan.model):  # not while checkpointing recomputes: that must leave nothing behind
            self._note(record, call, sources, [t for _, t in found])
            if record.partial:
                record.edges += [torch.autograd.graph.get_gradient_edge(gradient_target(t)) for _, t in found]
        else:
            self._recomputes = True
        for name in owned.values():
            record.pending.discard((module, name))
        on_gradients([t for _, t in found], lambda deltas: self._receive(record, call, deltas))

    def _note(self, record: Recording, call: ModuleCall, sources: list[Tensor], tensors: list[Tensor]) -> None:
        """Keep what the inspection at the end of the model's forward needs to know of a call."""
        undecided = [(call, o) for o in call.outputs if not o.decided]
        record.undecided += undecided
        if undecided or not self._discovery.settled:
            for o, t in zip(call.outputs, tensors, strict=True):
                o.edge = torch.autograd.graph.get_gradient_edge(gradient_target(t))
        if not self._discovery.settled:
            call.inputs = [torch.autograd.graph.get_gradient_edge(t).node for t in sources if t.requires_grad]
            record.calls.append(call)

    def _output(self, record: Recording, module: nn.Module, index: int, tensor: Tensor) -> Output:
        rule, b = self._plan.rules[module], record.batch_size
        features = rule.feature_dims(module, tensor.ndim) if rule is not None else 0
        if record.segments is not None:
            parts, total = record.segments
            placed = parts.within(tensor.shape[: tensor.ndim - features], total)
            return Output(index, tensor.shape, None, [] if placed is None else [placed], placed, True)
        if b == 1:  # everything belongs to the one sample
            return Output(index, tensor.shape, None, [0], 0, True)
        known = self._discovery.layouts.get((module, index, tensor.ndim))
        if known is not None and layouts.admits(tensor.shape, b, known):
            return Output(index, tensor.shape, None, [known], known, True)
        options = layouts.candidates(tensor.shape, b, feature_dims=features, batch_dim=self._batch_dim)
        layout = options[0] if options else None
        if isinstance(layout, str):
            record.coincidence = True
        # The model's own output defines what a sample is, so the convention is all there is to go by.
        certain = layout is None or self._batch_dim is not None
        certain |= module is self._plan.model and isinstance(layout, int)
        return Output(index, tensor.shape, None, options, layout, certain)

    def _receive(self, record: Recording, call: ModuleCall, deltas: list[Tensor | None]) -> None:
        if not record.open or record.probing or is_suspended():
            return
        owned = self._plan.owned.get(call.module)
        record.fired = True
        if owned:
            self.low_precision |= any(d is not None and d.dtype in (torch.bfloat16, torch.float16) for d in deltas)
            self._covered.update(owned.values())
            contribute(record, call, in_shapes(deltas, call.outputs), self._plan)
            self.low_precision |= record.approximate
        else:
            call.release()


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _matmul_input(x: Tensor, output: Tensor, *, matmul: bool) -> Kept | Borrowed:
    """The input as the layer's matmul saw it: under autocast a low-precision copy, half the memory of the original."""
    if not matmul:
        return Kept(x)
    low = output.dtype in (torch.bfloat16, torch.float16) and x.dtype == torch.float32
    return Borrowed.of(x, output) or Kept(x.detach().to(output.dtype) if low else x)
