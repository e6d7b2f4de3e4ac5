"""What a model costs when it is stacked, and whether it can be: found out on two models and one batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finfluence.errors import InputError, OracleError
from finfluence.runs.data import model_device
from finfluence.runs.engine import isolated_rng
from finfluence.runs.oracle.executors._stack import Randomness, StackedData, StackedTraining
from finfluence.runs.oracle.problem import Job, Problem, one_line


@dataclass(frozen=True)
class Cost:
    """What stacking a model takes.

    Attributes:
        randomness: "different" where the model draws random numbers, else "error".
        state_bytes: parameters, gradients and optimizer state of one model.
        sample_bytes: what one sample takes in one model's forward and backward pass.
        step_bytes: what one model takes in a step, all in all.
    """

    randomness: Randomness
    state_bytes: int
    sample_bytes: int
    step_bytes: int


def probe(problem: Problem, job: Job, *, data: StackedData, queries: dict[str, Any], template: nn.Module) -> Cost:
    """Takes one step and one measurement of two stacked models.

    Raises:
        OracleError: vmap does not support the model or the task, or they fail by themselves; names the module and why.
    """
    randomness: Randomness = "error"
    while True:
        visited: list[str] = []
        try:
            with isolated_rng(model_device(template)):
                training = StackedTraining(
                    problem, [job, job], data=data, queries=queries, template=template, randomness=randomness
                )
                with _modules_entered(training.module, visited):
                    return _cost(training)
        except InputError:
            raise
        except Exception as error:
            if randomness == "error" and "random" in str(error):
                randomness = "different"
                continue
            where = f"in module {visited[-1]}" if visited else f"in {type(problem.task).__name__}"
            raise OracleError(
                f"executor 'ensemble' cannot stack this model: {one_line(error)} ({where}); use executor='processes'"
            ) from error


def _cost(training: StackedTraining) -> Cost:
    saved: dict[int, int] = {}
    # parameters are saved for the backward pass too, but take no memory of their own there
    parameters = {tensor.untyped_storage().data_ptr() for tensor in training.state.values()}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[place] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = training.losses(training.first_batches())
    training.step(training.gradients(losses), training.problem.plan.optimizer.lr)
    state = sum(t.numel() * t.element_size() for t in training.state.values()) // 2
    width = training.problem.plan.batch_size
    # of two models; the backward pass takes about as much again as the forward pass has saved
    sample_bytes = sum(saved.values()) // width + training.data.row_bytes + 1
    training.measure(sample_bytes)
    states = 2 + len(next(iter(training.optimizer.state.values()), {})) if training.optimizer else 2
    return Cost(training.randomness, state * states, sample_bytes, state * states + width * sample_bytes)


@contextlib.contextmanager
def _modules_entered(module: nn.Module, visited: list[str]) -> Iterator[None]:
    """Keeps in `visited` the modules whose forward pass has begun and not ended: the innermost last."""
    handles = []
    lock = threading.Lock()

    def enter(label: str) -> Any:
        def hook(*_: Any) -> None:
            with lock:
                visited.append(label)

        return hook

    def leave(*_: Any) -> None:
        with lock:
            visited.pop()

    for name, child in module.named_modules():
        label = f"{name!r} ({type(child).__name__})" if name else type(child).__name__
        handles += [child.register_forward_pre_hook(enter(label)), child.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
