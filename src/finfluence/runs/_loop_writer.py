"""Writes down what a loop that the user owns does, so that it can be taken again (see `runs.loop_record`)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from finfluence.errors import FinfluenceWarning, InputError, RecordingError
from finfluence.runs._manifest import SignalKind, check_choice, describe_optimizer
from finfluence.runs._replay_store import ReplayStore
from finfluence.runs.data import model_device
from finfluence.runs.engine import RandomState, random_state
from finfluence.runs.loop_record import LOOP_FOLDER, LoopPart, LoopStep, packed_steps, read_steps
from finfluence.runs.panel import NoisePanel
from finfluence.runs.plan import OptimizerConfig, Plan, Precision
from finfluence.runs.sampling import Sampler
from finfluence.runs.states import StateStore, training_state
from finfluence.sensitivity import SGD, Adam, AdamRule, AdamW, SGDRule, from_torch
from finfluence.signals import Folder, IdDtype, SignalWriter


@dataclass(frozen=True)
class LoopSettings:
    """How a loop is kept, and what cannot be seen of it.

    Attributes:
        signals: of the replay, "batch" or "full".
        panel: of the replay.
        checkpoint_every: steps between stored states.
        clip_norm: global norm at which the loop clips its gradient; None if it does not.
        precision: of its forward passes.

    Raises:
        InputError: a value that cannot be used.
    """

    signals: SignalKind
    panel: NoisePanel
    checkpoint_every: int
    clip_norm: float | None
    precision: Precision

    def __post_init__(self) -> None:
        check_choice("signals", self.signals, get_args(SignalKind))
        check_choice("precision", self.precision, get_args(Precision))
        if self.checkpoint_every < 1:
            raise InputError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be positive or None, got {self.clip_norm!r}")


class LoopRecord:
    """Writes the states of a running loop and what it does between them.

    Args:
        model: under training.
        optimizer: of the loop.
        settings: how it is kept.
        samples: table with a row for each of the dataset's; None where ids are rows.
        id_dtype: type of the ids.

    Raises:
        InputError: ids that cannot be rows.
        RecordingError: an optimizer that a replay cannot build again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: LoopSettings,
        *,
        samples: pl.DataFrame | None,
        id_dtype: IdDtype,
    ) -> None:
        if samples is None and id_dtype == "str":
            raise InputError(
                "a replay must know which row of the dataset an id names; give samples=, a table with a row for each "
                "of the dataset's, or the rows' indices for ids"
            )
        _check_optimizer(optimizer, {name: p for name, p in model.named_parameters() if p.requires_grad})
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self._names = None if samples is None else samples["sample"].to_list()
        self._rows = None if self._names is None else {name: row for row, name in enumerate(self._names)}
        self._device = model_device(model)
        self._last: int | None = None
        self._steps: list[LoopStep] = []
        self._parts: list[LoopPart] = []
        self._tally = _Tally()

    def open(self, folder: Folder) -> dict[str, Any]:
        """Takes the run directory to write into.

        Returns:
            The entries of run.json that are known before the loop begins.
        """
        self._states, self._segments = StateStore(folder), StateStore(folder, LOOP_FOLDER)
        settings = self.settings
        return {
            "signals": settings.signals,
            "panel": {"samples": settings.panel.samples, "positions": settings.panel.positions},
            "checkpoint_every": settings.checkpoint_every,
        }

    def stored(self) -> list[int]:
        """Steps before which a state is stored, ascending."""
        return self._states.steps()

    def resume(self, step: int, writer: SignalWriter) -> None:
        """Goes on from the state before `step`, the first that will be taken; later ones and a replay are dropped."""
        ReplayStore(self._states.directory, writer, queries=writer.manifest["queries"]).forget()
        writer.clear("self")
        writer.update_manifest(self_influence="none")
        for store in (self._states, self._segments):
            for other in store.steps():
                if other > step or step == 0:
                    store.remove(other)
        self._last = step or None
        if step:
            self._tally = _Tally.read(self._segments.load(step))

    def visits(self) -> pl.DataFrame:
        """step and sample of every visit up to the last stored state."""
        step, found = 0, [pl.DataFrame({"step": [], "sample": []}, schema={"step": pl.Int64, "sample": pl.Int64})]
        for cut in self._segments.steps():
            for done in read_steps(self._segments.directory, cut):
                rows = np.concatenate([part.rows for part in done.parts])
                found.append(pl.DataFrame({"step": np.full(len(rows), step), "sample": rows}))
                step += 1
        visits = pl.concat(found)
        if self._names is None:
            return visits
        return visits.with_columns(sample=pl.Series("sample", self._names)[visits["sample"]])

    def due(self, step: int) -> bool:
        """Whether the state before `step` is to be stored."""
        return self._last is None or step % self.settings.checkpoint_every == 0

    @contextlib.contextmanager
    def part(self, names: np.ndarray, denominator: float | None, *, segments: Any) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch.

        Args:
            names: (b,) ids.
            denominator: what the sum of their losses is divided by; b by default.
            segments: of samples one behind the other, which are refused.
        """
        if segments is not None:
            raise RecordingError(
                "samples one behind the other in one row cannot be replayed; give each a row of its own, or record "
                "live signals alone (sensitivity='live')"
            )
        rows = names if self._rows is None else np.array([self._rows[name] for name in names.tolist()])
        before = random_state(self._device)
        yield
        drawn = not _same(before, random_state(self._device))
        own = LoopPart(rows, float(len(rows) if denominator is None else denominator), before if drawn else None)
        self._parts.append(own)

    def end(self, *, step: int, place: tuple[int, int], rates: Sequence[float], scale: float) -> None:
        """The micro-batches since the last step make up one.

        Args:
            step: its index.
            place: its epoch and position.
            rates: learning rate of every param group.
            scale: what its gradient was multiplied by before the optimizer saw it.

        Raises:
            RecordingError: it was multiplied by something that a replay could not do again.
        """
        if scale != 1.0 and self.settings.clip_norm is None:
            raise RecordingError(
                f"the gradient of step {step} was multiplied by {scale:.3g} before the optimizer's step; give "
                "clip_norm= if it is clipped by its norm. Scaled float16 gradients cannot be replayed: train in "
                "bfloat16 or float32, or record live signals alone (sensitivity='live')"
            )
        done = LoopStep(*place, tuple(rates), self._parts)
        self._steps.append(done)
        self._tally.add(done)
        self._parts = []

    def check_precision(self, low: bool) -> None:
        """Refuses 16 bits that a replay is not told of.

        Raises:
            RecordingError: the forward pass had `low` precision while the parameters, frozen ones too, have more.
        """
        coarse = (torch.bfloat16, torch.float16)
        more = not any(p.dtype in coarse for p in self.model.parameters())
        if low and more and self.settings.precision == "float32":
            raise RecordingError(
                "the forward pass runs in 16 bits while the parameters have more; give "
                "precision='bfloat16-autocast', so that a replay does the same"
            )

    def forget(self) -> None:
        """Drops micro-batches that no step followed."""
        self._parts = []

    def cut(self, step: int) -> None:
        """Stores the state before `step`, and what the loop did since the last one."""
        if self._last == step:
            return
        if self._steps:
            self._segments.save(step, packed_steps(self._steps) | self._tally.tensors())
        self._states.save(step, training_state(self.model, self.optimizer))
        self._steps, self._last = [], step

    def describe(self, *, seed: int | None, sampler: Sampler) -> dict[str, Any]:
        """The entries of run.json with which the finished loop can be done again.

        Args:
            seed: of the run's description.
            sampler: how batches were drawn.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = [
            {"parameters": [names[id(p)] for p in group["params"] if p.requires_grad], "options": _plain(group)}
            for group in self.optimizer.param_groups
        ]
        # what a replay does not read is the nearest plan, for whoever reads the run
        tally = self._tally
        plan = Plan(
            optimizer=_config(self.optimizer, tally.rate),
            epochs=len(tally.epochs),
            batch_size=tally.batch,
            seed=0 if seed is None else seed,
            sampler=sampler,
            accumulation=min(tally.parts, tally.batch),
            clip_norm=self.settings.clip_norm,
            precision=self.settings.precision,
        )
        loop = {"optimizer": type(self.optimizer).__name__, "groups": groups, "epochs": tally.epochs}
        found = {"loop": loop, "plan": plan.as_dict(), "batch_size": plan.batch_size, "total_steps": sum(tally.epochs)}
        # a loop that warms up begins with a rate of 0, and may end with one
        found["optimizer"] = describe_optimizer(self.optimizer) | {"lr": tally.rate}
        if sampler.kind == "shuffled":
            found |= self._checked_epochs()
        return found

    def _checked_epochs(self) -> dict[str, Any]:
        """Entries of run.json without a panel where the noise formula of shuffled epochs does not hold."""
        epochs = self._tally.epochs
        if epochs[-1] < epochs[0] or len(set(epochs[:-1])) > 1:
            reason = f"the epochs have {', '.join(map(str, epochs))} steps, and which rows an unfinished one reaches"
        elif not self._tally.regular:
            reason = "the number of rows differs from step to step, and what that adds"
        else:
            return {}
        warnings.warn(
            f"{reason} is noise that no panel shows: the noise is estimated from how signals differ between "
            "successive batches, and a replay has batch signals; train whole epochs of equal batches for better",
            FinfluenceWarning,
            stacklevel=6,
        )
        return {"panel": {"samples": 0, "positions": self.settings.panel.positions}, "signals": "batch"}


@dataclass
class _Tally:
    """What is to be said of a loop as a whole.

    Attributes:
        epochs: steps of each epoch.
        rate: the largest learning rate.
        batch: most rows of a step.
        parts: most micro-batches of a step.
        regular: whether all steps of an epoch have as many rows, but for the last.
    """

    epochs: list[int] = field(default_factory=list)
    rate: float = 0.0
    batch: int = 0
    parts: int = 1
    regular: bool = True
    last: int = 0

    def add(self, step: LoopStep) -> None:
        size = sum(len(part.rows) for part in step.parts)
        within = step.epoch < len(self.epochs)
        self.regular &= not self.batch or (size <= self.batch and not (within and self.last < self.batch))
        self.epochs += [0] * (step.epoch + 1 - len(self.epochs))
        self.epochs[step.epoch] += 1
        self.rate = max(self.rate, *step.rates)
        self.batch, self.last = max(self.batch, size), size
        self.parts = max(self.parts, len(step.parts))

    def tensors(self) -> dict[str, Tensor]:
        others = [self.rate, self.batch, self.parts, self.regular, self.last]
        return {
            "tally_epochs": torch.tensor(self.epochs, dtype=torch.int64),
            "tally_others": torch.tensor(others, dtype=torch.float64),
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> _Tally:
        rate, batch, parts, regular, last = tensors["tally_others"].tolist()
        return cls(tensors["tally_epochs"].tolist(), rate, int(batch), int(parts), bool(regular), int(last))


def _check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses an optimizer that a replay cannot build again.

    Raises:
        RecordingError: another class than torch's SGD, Adam and AdamW, or an option without a rule.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise RecordingError(
            f"a replay takes the steps of {type(optimizer).__name__} again, which finfluence cannot build; use "
            "torch.optim.SGD, Adam or AdamW, or record live signals alone (sensitivity='live')"
        )
    from_torch(optimizer, parameters)


def _same(one: RandomState, other: RandomState) -> bool:
    return all(a is None or (b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's options as JSON has them; the learning rate is recorded step by step."""
    kept = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr", "param_names")}
    return {k: list(v) if isinstance(v, tuple) else float(v) if isinstance(v, Tensor) else v for k, v in kept.items()}


def _config(optimizer: torch.optim.Optimizer, rate: float) -> OptimizerConfig:
    """The first param group's rule as a configuration."""
    rule = next(iter(from_torch(optimizer, _named(optimizer)).values())).rule
    if isinstance(rule, SGDRule):
        return SGD(rate, rule.momentum, rule.dampening, rule.weight_decay, rule.nesterov)
    assert isinstance(rule, AdamRule)
    made = AdamW if rule.decay == "decoupled" else Adam
    return made(rate, rule.betas, rule.eps, rule.weight_decay)


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return {str(i): p for i, p in enumerate(parameters)}
