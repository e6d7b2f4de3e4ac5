"""The complete, frozen description of how a model is trained: what a replay repeats and what the oracle reruns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from finfluence.errors import InputError
from finfluence.runs.sampling import Sampler
from finfluence.sensitivity import SGD, Adam, AdamW
from finfluence.sensitivity import from_dict as optimizer_from_dict

OptimizerConfig = SGD | Adam | AdamW
ScheduleKind = Literal["constant", "linear", "cosine"]
Precision = Literal["float32", "bfloat16-autocast"]


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor over a run: linear warm-up, then constant, linear decay to 0 or cosine decay to 0.

    Attributes:
        kind: "constant", "linear" or "cosine".
        warmup_steps: steps over which the factor rises linearly from 1/(warmup_steps + 1) to 1.
    """

    kind: ScheduleKind = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise InputError(f"unknown schedule {self.kind!r}; choose one of {', '.join(get_args(ScheduleKind))}")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    def factor(self, step: int, total: int) -> float:
        """Factor on the learning rate at `step` of `total` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Plan:
    """How a training run is done, data and model aside.

    Attributes:
        optimizer: finfluence.SGD, Adam or AdamW.
        epochs: passes over the data.
        batch_size: samples an optimizer step sees (all micro-batches together).
        seed: of the batch order and of dropout.
        sampler: how batches are drawn.
        schedule: learning-rate schedule over the run.
        clip_norm: global gradient norm above which the gradient is scaled down; None for no clipping.
        accumulation: micro-batches that a batch is cut into; the gradient stays the mean over the batch.
        precision: "float32" (the model's own dtype) or "bfloat16-autocast".
    """

    optimizer: OptimizerConfig
    epochs: int
    batch_size: int
    seed: int = 0
    sampler: Sampler = field(default_factory=Sampler)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float | None = None
    accumulation: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, OptimizerConfig):
            raise InputError(
                f"optimizer must be finfluence.SGD, Adam or AdamW, got {type(self.optimizer).__name__}; "
                "for a torch.optim optimizer in a loop of your own use finfluence.Recorder"
            )
        for name in ("epochs", "batch_size", "accumulation"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a non-negative integer, got {self.seed!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be positive or None, got {self.clip_norm!r}")
        if self.accumulation > self.batch_size:
            raise InputError(f"accumulation ({self.accumulation}) exceeds batch_size ({self.batch_size})")
        if self.precision not in get_args(Precision):
            raise InputError(f"unknown precision {self.precision!r}; choose one of {', '.join(get_args(Precision))}")

    def steps(self, n: int) -> int:
        """Optimizer steps of a run over n samples."""
        return self.epochs * self.sampler.steps_per_epoch(n, self.batch_size)

    def measured_steps(self, epochs: Sequence[float], n: int) -> tuple[int, ...]:
        """The steps of a run over n samples after which it is measured.

        Args:
            epochs: after which, increasing; a part of an epoch is the nearest step.
            n: samples that batches are drawn from.

        Raises:
            InputError: two of them are the same step, or one is before the first step.
        """
        per_epoch = self.sampler.steps_per_epoch(n, self.batch_size)
        steps = tuple(round(epoch * per_epoch) for epoch in epochs)
        if len(set(steps)) < len(steps) or min(steps) < 1:
            asked = ", ".join(f"{epoch:g}" for epoch in epochs)
            raise InputError(f"an epoch has {per_epoch} steps, too few to measure after epochs {asked}; give fewer")
        return steps

    def with_seed(self, seed: int) -> Plan:
        """The same plan with another seed."""
        return replace(self, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; `Plan.from_dict` reads it back."""
        return asdict(self) | {"optimizer": self.optimizer.as_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan written by `as_dict`."""
        return cls(
            **(
                data
                | {
                    "optimizer": optimizer_from_dict(data["optimizer"]),
                    "sampler": Sampler(**data["sampler"]),
                    "schedule": Schedule(**data["schedule"]),
                }
            )
        )
