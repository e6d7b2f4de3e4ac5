"""The curvature that piecewise linear layers have in their kinks, where autograd sees none.

The second derivative of ReLU is a unit impulse at 0, and autograd's is 0. One network's gradient jumps where an
activation switches, so its derivative misses what a training feels: over reruns, and over small changes of the data, a
unit near its kink is on in one and off in another. Spread over a normal kernel of width h the impulse is the smooth

    r''(x) = φ(x/h)/h,

the second derivative of ReLU averaged over inputs that vary with standard deviation h. A maximum has its kink where two
candidates are equal: max(a, b) = a + relu(b − a).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# By how much a function's slope jumps, and where; and whether it overwrites its input.
Jump = tuple[Any, float]
Described = tuple[tuple[Jump, ...], bool]

_MODULES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d)


def has_kinks(model: nn.Module) -> bool:
    """Whether a model has modules whose kinks `Kinks` smooths; activations that it calls by themselves do not show."""
    return any(isinstance(module, _MODULES) for module in model.modules())


class Kinks(TorchFunctionMode):
    """Inside this context kinks have curvature: those of ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh and max pooling.

    Values stay what they are. By default gradients do, too, and a second backward pass finds φ(x/h)/h, times the jump
    of the slope, beside the derivative that autograd knows. With `slopes` the slope itself is smooth, Φ(x/h) in place
    of a step, for finite differences of gradients. The width h is a part of the standard deviation of the activation's
    whole input; in pooling (over one or two dimensions) of the root mean square by which the largest value of a window
    exceeds the second. Other maxima and clamping are left as they are, as is what TorchScript has compiled.

    Attributes:
        width: h over that scale; 0 only counts.
        slopes: whether first derivatives are smooth.
        found: layers with kinks so far.
    """

    def __init__(self, width: float, *, slopes: bool = False) -> None:
        super().__init__()
        self.width, self.slopes, self.found = width, slopes, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.grad and self.width > 0:
            return self._differentiated(*args, **kwargs)
        describe, runner_up = _KINKED.get(func), _POOLED.get(func)
        if describe is None and runner_up is None:
            return func(*args, **kwargs)
        inputs = args[0] if args else kwargs["input"]
        self.found += 1
        # under vmap a tensor does not know that it has a gradient
        if not (self.width > 0 and torch.is_grad_enabled() and inputs.is_floating_point() and inputs.numel()):
            return func(*args, **kwargs)
        if runner_up is not None:
            value = func(*args, **kwargs)
            second = runner_up(*args, **kwargs)
            return value if second is None else self._with_second(value, second)
        assert describe is not None
        jumps, overwrites = describe(*args, **kwargs)
        if not overwrites:
            return self._with_curvature(inputs, func(*args, **kwargs), jumps)
        before = inputs.clone()
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        value = func(before.clone(), *args[1:], **rest)
        return inputs.copy_(self._with_curvature(before, value, jumps))

    def _differentiated(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, *, materialize_grads: bool = False, **options: Any
    ) -> tuple[Tensor | None, ...]:
        """`torch.autograd.grad` inside the mode, so that checkpointed layers are computed again as they were computed.

        Called with tensors it would leave the mode; edges of the graph it does not look at.
        """
        outputs, inputs, grad_outputs = _several(outputs), _several(inputs), _several(grad_outputs)
        ends, starts = _edges(outputs), _edges(inputs)
        if ends is None or starts is None:
            options["materialize_grads"] = materialize_grads
            return torch.autograd.grad(outputs, inputs, grad_outputs or None, **options)
        if not grad_outputs:
            grad_outputs = tuple(torch.ones_like(output) for output in outputs)
        if materialize_grads:
            options["allow_unused"] = True
        with self:
            found = torch.autograd.grad(ends, starts, grad_outputs, **options)
        if not materialize_grads:
            return found
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))

    def _with_curvature(self, inputs: Tensor, value: Tensor, jumps: tuple[Jump, ...]) -> Tensor:
        width = self.width * inputs.detach().std(correction=0)
        for jump, at in jumps:
            value = value + _kink(inputs - at if at else inputs, width, jump=jump, slopes=self.slopes)
        return value

    def _with_second(self, value: Tensor, second: Tensor) -> Tensor:
        behind = second - value
        return value + _kink(behind, self.width * behind.detach().square().mean().sqrt(), slopes=self.slopes)


def _several(tensors: Any) -> tuple[Any, ...]:
    if tensors is None or isinstance(tensors, Tensor):
        return () if tensors is None else (tensors,)
    return tuple(tensors)


def _edges(tensors: tuple[Any, ...]) -> list[Any] | None:
    """Where tensors stand in the graph; None of what torch's function transforms wrap, or has no gradient."""
    if not all(t.requires_grad for t in tensors if isinstance(t, Tensor)):
        return None
    try:
        return [get_gradient_edge(t) if isinstance(t, Tensor) else t for t in tensors]
    except AttributeError:
        return None


def _kink(x: Tensor, width: Tensor, *, jump: Any = 1.0, slopes: bool) -> Tensor:
    """0, with the slope 0 and the curvature φ(x/h)/h; with `slopes` the slope Φ(x/h) less that of a step; times `jump`.

    Where all inputs are the same, or some are infinite, there is nothing to smooth over, and no curvature.
    """
    smooth = torch.isfinite(width) & (width > 0)
    scale = torch.where(smooth, width, 1.0)
    x = torch.where(smooth, x, 0.0)
    at = x.detach()
    moved = x - at  # 0, but its derivative is not
    if slopes:
        return moved * (torch.special.ndtr(at / scale) - (at > 0).to(x.dtype)) * (jump * smooth)
    density = torch.exp(at.square() * (-0.5 / scale.square()))
    return moved.square() * (density * (jump * smooth / (2.0 * math.sqrt(2.0 * math.pi) * scale)))


def _relu(input: Tensor, inplace: bool = False) -> Described:
    return ((1.0, 0.0),), inplace


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Described:
    return ((1.0 - negative_slope, 0.0),), inplace


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Described:
    return ((1.0, min_val), (-1.0, max_val)), inplace


def _relu6(input: Tensor, inplace: bool = False) -> Described:
    return _hardtanh(input, 0.0, 6.0, inplace)


def _prelu(input: Tensor, weight: Tensor) -> Described:
    channels = weight.view(-1, *[1] * (input.ndim - 2)) if input.ndim > 1 else weight
    return ((1.0 - channels, 0.0),), False


def _second(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    flat: bool,
) -> Tensor | None:
    """The second largest value of every window of max_pool2d, or max_pool1d (`flat`); None with `ceil_mode`."""

    def both(value: Any, across: int) -> tuple[int, int]:
        """Of the two dimensions, the first with its `across` where there is only the other."""
        first, last = (value, value) if isinstance(value, int) else (value[0], value[-1])
        return (across if flat else int(first)), int(last)

    kernel, step, spacing = both(kernel_size, 1), both(stride or kernel_size, 1), both(dilation, 1)
    above, before = both(padding, 0)
    if ceil_mode or kernel == (1, 1):
        return None
    images = input.unsqueeze(-2) if flat else input
    lead = images.shape[:-2]
    images = images.reshape(-1, 1, *images.shape[-2:])
    if above or before:
        images = functional.pad(images, (before, before, above, above), value=float(images.detach().min()) - 1.0)
    second = functional.unfold(images, kernel, dilation=spacing, stride=step).topk(2, dim=1).values[:, 1]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(images.shape[-2:], kernel, step, spacing, strict=True)]
    found = second.reshape(*lead, *size)
    return found.squeeze(-2) if flat else found


_POOLED: dict[Any, Callable[..., Tensor | None]] = {
    functional.max_pool1d: functools.partial(_second, flat=True),
    functional.max_pool2d: functools.partial(_second, flat=False),
}
_KINKED: dict[Any, Callable[..., Described]] = {
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: functools.partial(_relu, inplace=True),
    Tensor.relu_: functools.partial(_relu, inplace=True),
    functional.leaky_relu: _leaky_relu,
    functional.leaky_relu_: functools.partial(_leaky_relu, inplace=True),
    functional.hardtanh: _hardtanh,
    functional.hardtanh_: functools.partial(_hardtanh, inplace=True),
    functional.relu6: _relu6,
    functional.prelu: _prelu,
    Tensor.prelu: _prelu,
}
