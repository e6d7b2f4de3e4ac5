"""How a recorded run is walked backwards, and what that will need, said before it starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import Any, Literal, get_args

import psutil
import torch
from torch import nn

from finfluence.errors import InputError
from finfluence.sensitivity import (
    DEFAULT_DAMPING,
    EXACT_LIMIT,
    AdjointOptions,
    ClipDerivative,
    HessianMethod,
    SecondMoment,
    has_kinks,
)

# What a segment's states may take before they go to a file, as a share of the free memory and, on a CPU, of what the
# process has anyway: a replay is to stay within one and a half times the memory of the training.
_MEMORY_SHARE = 0.25
_PROCESS_SHARE = 0.1
# Batch gradients that one Hessian-vector product costs; several exact products of a small model share their overhead.
_PRODUCT_COST = {"exact": 1.5, "one-sided": 1.0, "central": 2.0}
# Widths of kinks, set by hand on digits: under SGD ranks and scale hardly move between 0.1 and 0.5, and convolutions at
# high rates want 0.3 and more; under AdamW adjoints diverged in one run of five at 0.2, in none at 0.15.
SMOOTHING, ADAPTIVE_SMOOTHING = 0.25, 0.1
# As `EXACT_LIMIT`, where activations have kinks.
KINKED_LIMIT = 30_000_000
_SPANS = ("second-half", "throughout")
# Even parts of the training that "throughout" measures after.
THROUGHOUT = 6


@dataclass(frozen=True)
class ReplayOptions:
    """How a recorded run is walked backwards.

    Attributes:
        damping: κ of the damped Adam adjoint, see `finfluence.sensitivity.AdjointOptions`; SGD ignores it.
        second_moment: how Adam's second moment is differentiated: "settled", with that of the end of the run as
            one more batch in the denominators; "exact", which with damping 0 is the true derivative of the run, for
            checks on small smooth problems; "constant", not at all. See `finfluence.sensitivity.AdjointOptions`.
        hessian: Hessian-vector products: "exact", "one-sided" or "central" differences of the gradient, or "auto":
            exact for models of up to a million parameters (30 million with modules like ReLU, whose differences take
            one more gradient a step), frozen ones included, and one-sided above.
        smoothing: width over which the kinks of ReLU and its kin are spread in Hessian-vector products, as a part of
            the standard deviation of the activation's input, see `finfluence.sensitivity.Kinks`. A ReLU network has a
            good part of its curvature there, and its second derivatives as autograd has them leave it out. None for
            0.25 under SGD and 0.1 under Adam, where wider ones can make the adjoint diverge in the first steps; 0 for
            the derivative of the run as it was.
        measure_epochs: epochs after which the queries are measured, increasing and up to the last, whole or not (1.5:
            after half of the second epoch), "second-half", or "throughout" for six even parts of the training;
            influence is on the mean of the measurements. Where the end of a training jitters, the mean over its last
            epochs is what reruns agree on, in a smaller unit of noise. Where many rows teach the same, the end says
            little of each, as any of them could be left out by then; throughout the training it was still learned
            from them. None for the end alone.
            `retrain(measure_epochs=...)` and `truth.influence(query, epoch="mean")` measure the same.
        clip_derivative: whether the factor of gradient clipping is taken as "constant" or differentiated ("exact").
        tolerance: relative difference between re-executed and stored parameters above which the replay stops; None for
            1e-5 in float32, 1e-12 in float64 and 1e-3 in lower precision.
        divergence: growth of a query's adjoint, relative to the gradient it started from, above which the query gets no
            scores; see `finfluence.sensitivity.AdjointMonitor`. `float("inf")` accepts any finite one.
        caution: growth above which a `FinfluenceWarning` is given.
        memory_bytes: what the states of one segment may take in memory before they go to a file; None for a tenth of
            what the process takes, or a quarter of what is free where that is less or on a GPU.

    Raises:
        InputError: a value that cannot be used.
    """

    damping: float = DEFAULT_DAMPING
    second_moment: SecondMoment = "settled"
    hessian: HessianMethod = "auto"
    smoothing: float | None = None
    measure_epochs: tuple[float, ...] | Literal["second-half", "throughout"] | None = None
    clip_derivative: ClipDerivative = "constant"
    tolerance: float | None = None
    divergence: float = 30.0
    caution: float = 5.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.damping) or self.damping < 0:
            raise InputError(f"damping is {self.damping!r}; give a finite number >= 0, e.g. {DEFAULT_DAMPING}")
        for name, kinds in (
            ("second_moment", SecondMoment),
            ("hessian", HessianMethod),
            ("clip_derivative", ClipDerivative),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(get_args(kinds))}")
        for name in ("divergence", "caution"):
            if not getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; give a number > 1")
        if self.smoothing is not None and not 0 <= self.smoothing < inf:
            raise InputError(f"smoothing is {self.smoothing!r}; give a width from 0 on, such as 0.25, or None")
        epochs = self.measure_epochs
        if epochs is not None and epochs not in _SPANS:
            numbers = not isinstance(epochs, str) and all(isinstance(e, int | float) and 0 < e < inf for e in epochs)
            if not numbers or not epochs or sorted(set(epochs)) != list(epochs):
                raise InputError(
                    f"measure_epochs is {epochs!r}; give increasing numbers of epochs, 'second-half' or 'throughout'"
                )
            object.__setattr__(self, "measure_epochs", _plain(epochs))
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(f"tolerance must be positive, got {self.tolerance!r}")
        if self.memory_bytes is not None and self.memory_bytes < 0:
            raise InputError(f"memory_bytes must not be negative, got {self.memory_bytes!r}")

    def resolved(self, *, adaptive: bool) -> ReplayOptions:
        """With the smoothing that suits the optimizer, where none is given; `adaptive`: of Adam's kind."""
        if self.smoothing is not None:
            return self
        return replace(self, smoothing=ADAPTIVE_SMOOTHING if adaptive else SMOOTHING)

    @property
    def adjoint(self) -> AdjointOptions:
        """What concerns the optimizer's derivative alone."""
        return AdjointOptions(damping=self.damping, second_moment=self.second_moment)

    def measured(self, epochs: int) -> tuple[float, ...]:
        """The epochs after which a training of so many is measured.

        Raises:
            InputError: `measure_epochs` does not end with the last.
        """
        if self.measure_epochs is None:
            return (epochs,)
        if self.measure_epochs == "second-half":
            return tuple(range(max(1, epochs // 2), epochs + 1))
        if self.measure_epochs == "throughout":
            return _plain(epochs * part / THROUGHOUT for part in range(1, THROUGHOUT + 1))
        if self.measure_epochs[-1] != epochs:
            raise InputError(
                f"measure_epochs ends with {self.measure_epochs[-1]:g}, the training with epoch {epochs}; end with it"
            )
        return self.measure_epochs

    def method(self, model: nn.Module) -> Literal["exact", "one-sided", "central"]:
        """The Hessian-vector product for a model."""
        if self.hessian != "auto":
            return self.hessian
        kinked = self.smoothing != 0 and has_kinks(model)
        size = sum(p.numel() for p in model.parameters())
        return "exact" if size <= (KINKED_LIMIT if kinked else EXACT_LIMIT) else "one-sided"

    def memory_budget(self, device: torch.device | None = None) -> int:
        """Bytes that a segment's states may take in memory, on the device where the model is."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        cuda = device is not None and device.type == "cuda"
        if cuda:
            return int(_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        held = psutil.Process().memory_info().rss
        return int(min(_MEMORY_SHARE * psutil.virtual_memory().available, _PROCESS_SHARE * held))

    def as_dict(self) -> dict[str, Any]:
        """What the signals depend on, JSON-ready; a replay with the same goes on where another stopped."""
        found = asdict(self)
        for name in ("tolerance", "caution", "memory_bytes"):
            del found[name]
        if self.measure_epochs is None:
            del found["measure_epochs"]
        elif self.measure_epochs not in _SPANS:
            found["measure_epochs"] = list(self.measure_epochs)  # as it is read back from JSON
        return found | {"divergence": str(self.divergence)}


def _plain(epochs: Iterable[float]) -> tuple[float, ...]:
    """Whole epochs as integers, as they are read back from JSON."""
    return tuple(int(epoch) if epoch == int(epoch) else float(epoch) for epoch in epochs)


@dataclass(frozen=True)
class ReplayPlan:
    """What a replay will need.

    Attributes:
        steps: optimizer steps to walk back.
        segments: stretches between stored states.
        queries: queries, each with Hessian-vector products of its own.
        hessian: how they are computed.
        panel_evaluations: per-sample gradients for the panel or for full signals, over the whole run.
        gradients: forward and backward passes of a batch, over the whole run.
        memory_bytes: states of the longest segment, as many as the budget allows, and the adjoints.
        file_bytes: the other states of that segment, which go to a temporary file.
        disk_bytes: stored states and signals.
        seconds: expected time at most, from the recorded training's own; None where that is not known.
    """

    steps: int
    segments: int
    queries: int
    hessian: str
    panel_evaluations: int
    gradients: float
    memory_bytes: int
    file_bytes: int
    disk_bytes: int
    seconds: float | None

    @property
    def spills(self) -> bool:
        """Whether states go to a file."""
        return self.file_bytes > 0

    @classmethod
    def estimate(
        cls,
        options: ReplayOptions,
        *,
        cuts: list[int],
        queries: int,
        batch_size: int,
        panel_evaluations: int,
        vectors: int,
        vector_bytes: int,
        hessian: str,
        training_seconds: float | None,
    ) -> ReplayPlan:
        """Works out the needs.

        Args:
            options: of the replay.
            cuts: steps before which a state is stored.
            queries: number of queries.
            batch_size: samples a step.
            panel_evaluations: per-sample gradients on the panel.
            vectors: vectors kept for each step of a segment.
            vector_bytes: bytes of one of them, as large as the trainable parameters.
            hessian: how Hessian-vector products are computed, see `ReplayOptions.method`.
            training_seconds: what the recorded training took; None where that is not known.
        """
        steps = cuts[-1] - cuts[0]
        longest = max(b - a for a, b in itertools.pairwise(cuts))
        state = vectors * vector_bytes
        held = state * min(longest, options.memory_budget() // max(1, state))
        gradients = steps * (2 + _PRODUCT_COST[hessian] * queries) + panel_evaluations / batch_size
        rows = steps * batch_size + panel_evaluations
        # one adjoint, sensitivity and product a query, and as much again for each slot of the optimizer's state
        adjoints = queries * (3 + max(0, vectors - 2)) * vector_bytes
        return cls(
            steps=steps,
            segments=len(cuts) - 1,
            queries=queries,
            hessian=hessian,
            panel_evaluations=panel_evaluations,
            gradients=gradients,
            memory_bytes=held + adjoints,
            file_bytes=longest * state - held,
            disk_bytes=len(cuts) * max(1, vectors - 1) * vector_bytes + rows * (16 + 4 * queries),
            seconds=None if training_seconds is None else gradients * training_seconds / steps,
        )

    def __str__(self) -> str:
        file = f" and {_size(self.file_bytes)} in a file" if self.spills else ""
        time = "" if self.seconds is None else f", at most about {_duration(self.seconds)}"
        return (
            f"replay: {self.steps} steps in {self.segments} segments, {self.queries} "
            f"{'query' if self.queries == 1 else 'queries'}, Hessian products {self.hessian}, "
            f"{self.gradients:.0f} batch gradients{time}; {_size(self.memory_bytes)} in memory{file}, "
            f"{_size(self.disk_bytes)} on disk"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
