"""Running a module again: forward-mode derivatives or central differences of its own forward, with nothing changed.

Used for every module without a closed form, and by the `jvp` and `finite-difference` ways for the whole model.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from finfluence.gradients._suspend import suspended


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure in a fixed order, through tuples, mappings and dataclasses."""
    if isinstance(tree, Tensor):  # pytree takes ten times as long for the usual few
        return [tree]
    if type(tree) in (tuple, list, dict):
        return [t for part in (tree.values() if type(tree) is dict else tree) for t in tensors_in(part)]
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


@dataclasses.dataclass(frozen=True)
class Ambience:
    """What a forward depends on beside its arguments: random states and autocast.

    Args:
        cpu: CPU generator state, None if not kept.
        cuda: device index → CUDA generator state.
        autocast: (device type, dtype) of every active autocast.
    """

    cpu: Tensor | None
    cuda: Mapping[int, Tensor]
    autocast: Sequence[tuple[str, torch.dtype]]

    @staticmethod
    def capture(devices: Sequence[torch.device], *, rng: bool) -> Ambience:
        """The current one, on the CPU and the given devices."""
        kinds = {"cpu", *(d.type for d in devices)}
        autocast = [(k, torch.get_autocast_dtype(k)) for k in sorted(kinds) if torch.is_autocast_enabled(k)]
        if not rng:
            return Ambience(None, {}, autocast)
        indices = sorted({_cuda_index(d) for d in devices if d.type == "cuda"})
        return Ambience(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in indices}, autocast)

    def restore_rng(self) -> None:
        """Set the random states to the kept ones."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block in this ambience; afterwards the random states are what they were before the block."""
        now = Ambience.capture([torch.device("cuda", i) for i in self.cuda], rng=True) if self.cpu is not None else None
        with ExitStack() as stack:
            for kind, dtype in self.autocast:
                # The cache would keep casts of the substituted parameters.
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            self.restore_rng()
            try:
                yield
            finally:
                if now is not None:
                    now.restore_rng()


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def devices_of(module: nn.Module) -> list[torch.device]:
    """The devices that hold a module's parameters and buffers."""
    return sorted({t.device for t in [*module.parameters(), *module.buffers()]}, key=str)


@contextmanager
def differentiable_forward(module: nn.Module) -> Iterator[None]:
    """A block in which operators with a forward-mode derivative are chosen, nothing is recorded, no graph is built."""
    recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(suspended())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:  # the fused recurrent kernels have none
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def substituted(module: nn.Module, substitutes: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """A block in which a module's parameters are replaced wherever they occur, and its buffers protected.

    `torch.func.functional_call` does not restore modules that occur twice in the tree, nor the lists of weights that
    recurrent kernels read.
    """
    saved: list[tuple[dict[str, Any], str, Any]] = []
    modules = list(module.modules())
    protect = any(m.training for m in modules)
    handles = []
    try:
        for m in modules:
            if type(m) is nn.Embedding and m.padding_idx is not None and m.weight in substitutes:
                handles.append(m.register_forward_hook(_fixed_padding(m.weight.detach()[m.padding_idx])))
            parameters: dict[str, Any] = m._parameters
            buffers: dict[str, Any] = m._buffers
            for name, p in list(parameters.items()):
                if p is not None and p in substitutes:
                    saved.append((parameters, name, p))
                    parameters[name] = substitutes[p]
            for name, buffer in list(buffers.items()):
                if protect and buffer is not None:
                    saved.append((buffers, name, buffer))
                    buffers[name] = buffer.clone()
        _refresh_recurrent(modules)
        yield
    finally:
        for held, name, original in reversed(saved):
            held[name] = original
        _refresh_recurrent(modules)
        for handle in handles:
            handle.remove()


def _fixed_padding(row: Tensor) -> Any:
    """A hook that keeps an embedding's padding row constant: backward passes give it no gradient through the layer."""

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == module.padding_idx).unsqueeze(-1), row, output)

    return hook


def _refresh_recurrent(modules: Sequence[nn.Module]) -> None:
    for m in modules:
        if isinstance(m, nn.RNNBase):
            m._flat_weights = [getattr(m, name, None) for name in m._flat_weights_names]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch compiles its own forward-mode decompositions with torch.jit at first use, and warns about that.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        # Substituted recurrent weights are not one contiguous block; that only costs memory.
        warnings.filterwarnings("ignore", message=".*single contiguous chunk of memory.*")
        # Switching the fused recurrent kernels off and on sets every flag of their backend, also unavailable ones.
        warnings.filterwarnings("ignore", message=".*TF32 acceleration on top of oneDNN.*")
        yield


def tangents(
    module: nn.Module,
    directions: Mapping[str, Tensor],
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    ambience: Ambience,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """A module's outputs and their derivative along a direction of its parameters, in forward mode.

    Args:
        module: called with its parameters substituted; its hooks run, recording is suspended.
        directions: local parameter name → direction of the parameter's shape.
        args: positional arguments.
        kwargs: keyword arguments.
        ambience: random states and autocast to run in.

    Returns:
        The output tensors, and for each its tangent (None where it does not depend on the parameters).
    """
    parameters = dict(module.named_parameters())
    with _quiet(), differentiable_forward(module), ambience.entered(), forward_ad.dual_level():
        duals = {
            parameters[name]: forward_ad.make_dual(parameters[name].detach(), q.to(parameters[name].dtype))
            for name, q in directions.items()
        }
        with substituted(module, duals):
            outputs = tensors_in(module(*args, **(kwargs or {})))
        pairs = [forward_ad.unpack_dual(t) if t.is_floating_point() else (t, None) for t in outputs]
        return [primal for primal, _ in pairs], [tangent for _, tangent in pairs]


def lacks_forward_mode(error: Exception) -> bool:
    """Whether an exception says that some operator has no forward-mode derivative."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        sign in text for sign in ("forward ad", "forward mode", "jvp", "jacobian-vector")
    )


def differences(
    module: nn.Module,
    directions: Mapping[str, Tensor],
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    ambience: Ambience,
    epsilon: float | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """As `tangents`, by (f(θ + εq) − f(θ − εq)) / 2ε: two forwards, no derivative of any operator needed."""
    parameters = dict(module.named_parameters())
    step = automatic_epsilon(parameters, directions) if epsilon is None else epsilon
    sides: list[list[Tensor]] = []
    for sign in (1.0, -1.0):
        with _quiet(), suspended(), torch.no_grad(), ambience.entered():
            moved = {
                parameters[name]: torch.add(parameters[name].detach(), q.to(parameters[name].dtype), alpha=sign * step)
                for name, q in directions.items()
            }
            with substituted(module, moved):
                sides.append(tensors_in(module(*args, **(kwargs or {}))))
    up, down = sides
    return [(a + b) / 2 if a.is_floating_point() else a for a, b in zip(up, down, strict=True)], [
        (a - b) / (2 * step) if a.is_floating_point() else None for a, b in zip(up, down, strict=True)
    ]


def automatic_epsilon(parameters: Mapping[str, Tensor], directions: Mapping[str, Tensor]) -> float:
    """The step of a central difference that balances truncation (ε²) and rounding (1/ε).

    ε = u^{1/3} · max(‖θ‖, √d·10⁻²) / ‖q‖ over the parameters that the direction moves, u the coarsest unit
    roundoff among them and d their number (Nocedal and Wright, Numerical Optimization, section 8.1).
    """
    moved = [name for name in directions if name in parameters]
    if not moved:
        return 1.0
    roundoff = max(torch.finfo(parameters[name].dtype).eps for name in moved)
    size = float(sum(parameters[name].detach().double().pow(2).sum() for name in moved)) ** 0.5
    norm = float(sum(directions[name].double().pow(2).sum() for name in moved)) ** 0.5
    count = sum(parameters[name].numel() for name in moved)
    if norm == 0.0:
        return 1.0
    return roundoff ** (1 / 3) * max(size, 1e-2 * count**0.5) / norm
