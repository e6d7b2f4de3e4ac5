"""One training step, written once: `train`, the replay's re-execution and the oracle's single trainings all call it.

Everything random in a step (dropout) is drawn from a stream derived from the plan's seed and the step's index, so a
step can be repeated on its own, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finfluence.errors import InputError, RecordingError
from finfluence.runs.data import Collate, batch_length, dataset_size, model_device, take
from finfluence.runs.plan import Plan
from finfluence.runs.sampling import Batch
from finfluence.runs.tasks import Task
from finfluence.sensitivity import ParameterRule, UpdateRule

_STEP_STREAM = 0x57E9
Around = Callable[[np.ndarray], AbstractContextManager[Any]]
RandomState = tuple[Tensor, Tensor | None]


class StepResult(NamedTuple):
    """What one step did.

    Attributes:
        loss: mean training loss of the batch (nan for an empty Poisson batch).
        clip_factor: what clipping multiplied the gradient by (1 without).
    """

    loss: float
    clip_factor: float


class Part(NamedTuple):
    """One micro-batch of a step.

    Attributes:
        indices: (b,) int64, rows of the dataset.
        denominator: what the sum of their losses is divided by.
    """

    indices: np.ndarray
    denominator: float


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's generators in one step of a run."""
    words = np.random.SeedSequence([seed, _STEP_STREAM, step]).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def seed_step(seed: int, step: int, *, device: torch.device) -> None:
    """Starts torch's generators, of the CPU and of the given device, on the stream of one step of a run.

    `torch.manual_seed` would seed every device that there might be, which costs more than a small model's step.
    """
    value = step_seed(seed, step)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type != "cpu":
        torch.manual_seed(value)


def random_state(device: torch.device) -> RandomState:
    """State of torch's generators, of the CPU and of a CUDA device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Puts torch's generators where `random_state` found them."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextlib.contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Leaves the caller's global random state (CPU and the given device) as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class Engine:
    """A model under training by a plan.

    Args:
        task: losses of a batch.
        model: trained in place.
        dataset: map-style dataset.
        plan: how to train.
        subset: (m,) int64 rows of the dataset that are trained on, ascending; None for all.
        collate: see `finfluence.runs.data.take`.
        population: number of samples that batches are cut for, see `Sampler.boundaries`; None for those trained on.

    Attributes:
        n: number of samples trained on.
        total_steps: optimizer steps of the whole run.
        parameters: trainable parameters by name.
        model_size: number of all the model's parameters.
        optimizer: the torch.optim optimizer.
        left_out: (rows of the dataset,) bool, samples that batches hold and steps pass over, so that the others of
            their batch take their weight; None for none.

    Raises:
        InputError: no trainable parameter, or a batch size that does not fit the data.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        *,
        dataset: Any,
        plan: Plan,
        subset: np.ndarray | None = None,
        collate: Collate | None = None,
        population: int | None = None,
    ) -> None:
        self.task, self.model, self.dataset, self.plan, self.collate = task, model, dataset, plan, collate
        self.subset = subset
        self._rows = dataset_size(dataset)
        self.n = self._rows if subset is None else len(subset)
        self.device = model_device(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model_size = sum(p.numel() for p in model.parameters())
        if not self.parameters:
            raise InputError("the model has no trainable parameter; set requires_grad on what should be trained")
        self.population = self.n if population is None else population
        self.total_steps = plan.steps(self.population)
        self.optimizer = plan.optimizer.build(list(self.parameters.values()))
        self.left_out: np.ndarray | None = None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The run's batches from step `start` on; indices are rows of the dataset."""
        plan = self.plan
        return plan.sampler.batches(
            self._rows,
            plan.batch_size,
            seed=plan.seed,
            steps=self.total_steps,
            start=start,
            kept=self.subset,
            population=self.population,
        )

    @property
    def rules(self) -> UpdateRule | Mapping[str, ParameterRule]:
        """The optimizer's update rule: one for all parameters, or each one's."""
        return self.plan.optimizer.rule

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.plan.sampler.steps_per_epoch(self.n, self.plan.batch_size)

    def measured_steps(self, epochs: Sequence[float]) -> tuple[int, ...]:
        """The steps after which the run is measured, see `Plan.measured_steps`."""
        return self.plan.measured_steps(epochs, self.n)

    def place(self, parameters: Mapping[str, Tensor]) -> None:
        """Moves the model to these trainable parameters, by name."""
        with torch.no_grad():
            for name, value in parameters.items():
                self.parameters[name].copy_(value)

    def rates(self, step: int) -> float | Sequence[float]:
        """The learning rate of a step, or one for each param group."""
        return self.learning_rate(step)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.plan.optimizer.lr * self.plan.schedule.factor(step, self.total_steps)

    def set_learning_rate(self, step: int) -> None:
        """Gives the optimizer the learning rate of a step."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def autocast(self) -> AbstractContextManager[Any]:
        """The plan's precision as a context."""
        if self.plan.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def losses(self, model: Any, indices: np.ndarray, *, precise: bool = False) -> Tensor:
        """(b,) losses of the given rows, checked for shape; `precise` ones are computed without the plan's autocast."""
        data = take(self.dataset, indices, collate=self.collate, device=self.device)
        with contextlib.nullcontext() if precise else self.autocast():
            losses = self.task.losses(model, data)
        if losses.shape != (len(indices),):
            raise InputError(
                f"Task.losses must return one loss a sample, shape ({len(indices)},), got {tuple(losses.shape)}; "
                'use reduction="none"'
                + ("" if batch_length(data) == len(indices) else " and check the collate function")
            )
        return losses

    def parts(self, batch: Batch) -> list[Part]:
        """The micro-batches of a batch that have samples, without those that are left out."""
        parts = self.micro_batches(batch)
        if self.left_out is None:
            return parts
        kept = [part.indices[~self.left_out[part.indices]] for part in parts]
        # Poisson sampling has a fixed denominator, and nothing takes a sample's place
        share = 1.0 if self.plan.sampler.kind == "poisson" else sum(map(len, kept)) / max(1, len(batch.indices))
        return [Part(rows, part.denominator * share) for rows, part in zip(kept, parts, strict=True) if len(rows)]

    def micro_batches(self, batch: Batch) -> list[Part]:
        """The micro-batches of a batch that have samples."""
        if self.plan.accumulation == 1:
            return [Part(batch.indices, batch.denominator)] if len(batch.indices) else []
        cut = np.array_split(batch.indices, self.plan.accumulation)
        return [Part(indices, batch.denominator) for indices in cut if len(indices)]

    def seed(self, step: int, part: int = 0) -> None:
        """Puts torch's generators where they are before a micro-batch of a step; the first one's start the others."""
        if part == 0:
            seed_step(self.plan.seed, step, device=self.device)

    def backward(self, batch: Batch, around: Around | None = None) -> float:
        """Accumulates the batch's gradient into `.grad` (cleared first) and returns its mean loss."""
        self.seed(batch.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, (indices, denominator) in enumerate(self.parts(batch)):
            if number:
                self.seed(batch.step, number)
            with around(indices) if around is not None else contextlib.nullcontext() as record:
                loss = self.losses(self.model, indices).sum() / denominator
                loss.backward()
                value = float(loss.detach())
                if record is not None:
                    record.loss = value * denominator / len(indices)
            total += value
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return total * batch.denominator / len(batch.indices) if len(batch.indices) else math.nan

    def clip(self) -> float:
        """Clips `.grad` as the plan says and returns the factor that was applied."""
        if self.plan.clip_norm is None:
            return 1.0
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.clip_norm))
        # torch divides by norm + 1e-6 and caps the factor at 1
        return min(1.0, self.plan.clip_norm / (norm + 1e-6))

    def step(self, batch: Batch, around: Around | None = None) -> StepResult:
        """Takes one optimizer step.

        Args:
            batch: what to train on.
            around: called with each micro-batch's sample indices; its context encloses the forward and backward pass,
            and what it yields is given the micro-batch's mean loss as `.loss`.

        Returns:
            The step's mean loss and clip factor.

        Raises:
            RecordingError: the loss is not finite; parameters are left as they were before the step.
        """
        self.set_learning_rate(batch.step)
        loss = self.backward(batch, around)
        if len(batch.indices) and not math.isfinite(loss):
            raise RecordingError(
                f"the training loss is {loss} at step {batch.step} (epoch {batch.epoch}); "
                "lower the learning rate, clip the gradient or look for broken samples in that batch"
            )
        factor = self.clip()
        self.optimizer.step()
        return StepResult(loss, factor)
