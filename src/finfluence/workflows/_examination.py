"""The tools of `doctor`: gradients, Hessian products and precisions of one batch, leaving the training state alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from finfluence.gradients import Direction, HookedDerivatives, query_gradient
from finfluence.runs import Engine
from finfluence.runs.tasks import measurement


class Cast:
    """A task whose batches come in another precision."""

    def __init__(self, task: Any, dtype: torch.dtype) -> None:
        self.task, self.dtype = task, dtype

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) losses."""
        return self.task.losses(model, _cast(batch, self.dtype))

    def measure(self, model: Any, batch: Any) -> Tensor:
        """() measurement."""
        return self.task.measure(model, _cast(batch, self.dtype))


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.dtype.is_floating_point else batch
    if isinstance(batch, Mapping):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    return type(batch)(_cast(value, dtype) for value in batch) if isinstance(batch, (tuple, list)) else batch


def without_autocast(plan: Any) -> Any:
    """The plan, computed in the weights' own precision."""
    return plan.from_dict(plan.as_dict() | {"precision": "float32"})


@contextmanager
def hooked(engine: Engine) -> Iterator[HookedDerivatives]:
    """Hooks on the engine's model, taken off at the end."""
    hooks = HookedDerivatives(engine.model, engine.parameters)
    try:
        yield hooks
    finally:
        hooks.remove()


def gradients_of(loss: Tensor, engine: Engine) -> dict[str, Tensor]:
    """∇loss by name, zeros where a parameter is not used; `.grad` stays as it is."""
    found = torch.autograd.grad(loss, list(engine.parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(engine.parameters, found, strict=True))


def query_value(engine: Engine, batch: Any) -> tuple[float, Direction]:
    """A query's value and gradient, under the plan's precision."""
    values: list[float] = []

    def measure(model: nn.Module) -> Tensor:
        with engine.autocast():
            value = measurement(engine.task, model, batch)
        values.append(float(value.detach()))
        return value

    gradient = query_gradient(engine.model, engine.parameters, measure)
    return values[-1], gradient


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().flatten().double() for p in parameters.values()])


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the model is."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
