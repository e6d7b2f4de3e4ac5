"""What a fine-tuning will need, found out by its first steps: `finfluence train --dry-run`."""

from __future__ import annotations

import functools
import itertools
import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finfluence.gradients import query_gradient
from finfluence.integrations.models import trainable_share
from finfluence.runs import Engine, NoisePanel, Recorder
from finfluence.runs._trajectory import kept_vectors
from finfluence.runs.data import query_batches
from finfluence.runs.engine import isolated_rng
from finfluence.runs.replay_plan import ReplayPlan
from finfluence.runs.self_signals import self_steps
from finfluence.runs.states import training_state
from finfluence.runs.tasks import measurement
from finfluence.runs.training import checkpoint_interval
from finfluence.sensitivity import FlatUpdate
from finfluence.workflows.finetuning import FineTuning, make_panel, make_replay_options

_WARM, _TIMED = 1, 2


@dataclass(frozen=True)
class Rehearsal:
    """The needs of a run.

    Attributes:
        steps: optimizer steps.
        trainable: trainable parameters.
        parameters: all parameters.
        step_seconds: of an average recorded step, from two timed ones.
        query_seconds: of the gradients of all queries, once.
        training_seconds: steps, queries and live panel together.
        replay: what the replay will need; None for live signals alone.
        memory_bytes: largest resident memory of the steps (on a GPU, allocated there), and of the replay.
        device: where.
        disk_bytes: states and signals.
        states: states that are kept.
    """

    steps: int
    trainable: int
    parameters: int
    step_seconds: float
    query_seconds: float
    training_seconds: float
    replay: ReplayPlan | None
    memory_bytes: int
    device: str
    disk_bytes: int
    states: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.training_seconds + (0.0 if self.replay is None else self.replay.seconds or 0.0)

    def __str__(self) -> str:
        kept = "the last state" if self.states == 1 else f"{self.states} states"
        lines = [
            ("model", f"{self.parameters:,} parameters, {self.trainable:,} trainable, on {self.device}"),
            ("steps", f"{self.steps}, {self.step_seconds:.3g} s each; queries {self.query_seconds:.3g} s a time"),
            ("training", _duration(self.training_seconds)),
        ]
        if self.replay is not None:
            lines.append(("replay", str(self.replay).removeprefix("replay: ")))
        lines += [
            ("time", f"about {_duration(self.seconds)} in all"),
            ("memory", f"{self.memory_bytes / 1e9:.2f} GB"),
            ("disk", f"{self.disk_bytes / 1e6:.1f} MB ({kept} and the signals)"),
        ]
        return "\n".join(f"  {name:<9}{text}" for name, text in lines)


def rehearse(work: FineTuning) -> Rehearsal:
    """Loads the model, takes the first steps of the training and works out what all of it needs. Nothing is kept.

    Args:
        work: a prepared fine-tuning.

    Returns:
        Time, memory and disk. The timed steps are scaled to the average batch's padded length.

    Raises:
        FinfluenceError: whatever the training itself would raise in its first steps.
    """
    made, options = work.recipe, work.configuration.sensitivity
    model = made.make_model(made.plan.seed)
    with isolated_rng(next(model.parameters()).device):
        return _rehearse(
            work,
            Engine(made.task, model, dataset=made.dataset, plan=made.plan, collate=made.collate),
            make_panel(options, len(made.dataset)),
        )


def _rehearse(work: FineTuning, engine: Engine, panel: NoisePanel) -> Rehearsal:
    options, plan, model = work.configuration.sensitivity, work.recipe.plan, engine.model
    batches = query_batches(work.recipe.queries, collate=work.recipe.collate, device=engine.device)
    measures = {name: functools.partial(_measure, engine, batch) for name, batch in batches.items()}
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    query_seconds, _ = _timed(engine, lambda: [query_gradient(model, engine.parameters, m) for m in measures.values()])
    seconds = _steps(engine, measures if options.kind != "replay" else {})
    scale = _average_size(work, engine) / _timed_size(work, engine)
    step = seconds * scale
    total = engine.total_steps
    per_epoch = plan.sampler.steps_per_epoch(engine.n, plan.batch_size)
    evaluations = min(panel.positions, per_epoch) * plan.epochs * panel.samples
    if options.signals == "full":
        evaluations = min(panel.positions, per_epoch) * plan.epochs * engine.n
    live = options.kind != "replay"
    training = total * step + (math.ceil(total / options.refresh) * query_seconds if live else 0.0)
    if options.kind == "live":
        training += evaluations / plan.batch_size * step
    own = {"none": 0, "record": total * plan.batch_size, "all": len(self_steps(total)) * engine.n}
    training += own[options.self_influence] / plan.batch_size * step
    interval = checkpoint_interval(total, refresh=options.refresh, every=options.checkpoint_every)
    cuts = [*range(0, total, interval), total]
    replay = None if options.kind == "live" else _replay(work, engine, cuts=cuts, evaluations=evaluations, step=step)
    states = 1 if replay is None else len(cuts)
    state = sum(t.numel() * t.element_size() for t in training_state(model, engine.optimizer).values())
    rows = (total * plan.batch_size) * (2 if options.kind == "both" else 1) + evaluations
    trainable, parameters = trainable_share(model)
    return Rehearsal(
        steps=total,
        trainable=trainable,
        parameters=parameters,
        step_seconds=step,
        query_seconds=query_seconds,
        training_seconds=training,
        replay=replay,
        memory_bytes=_peak(engine.device) + (0 if replay is None else replay.memory_bytes),
        device=torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type,
        disk_bytes=states * state + rows * (16 + 4 * len(batches)),
        states=states,
    )


def _measure(engine: Engine, batch: Any, model: nn.Module) -> Tensor:
    with engine.autocast():
        return measurement(engine.task, model, batch)


def _timed(engine: Engine, action: Any) -> tuple[float, Any]:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    began = time.perf_counter()
    found = action()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - began, found


def _steps(engine: Engine, measures: dict[str, Any]) -> float:
    """Seconds of a step without the queries' gradients: the mean of the steps behind the first."""
    first = list(itertools.islice(engine.batches(), _WARM + _TIMED))
    times = []
    with tempfile.TemporaryDirectory() as scratch:
        if not measures:
            times = [_timed(engine, functools.partial(engine.step, batch))[0] for batch in first]
        else:
            # the gradients of the queries are taken at the first step alone, and timed by themselves
            recorder = Recorder(
                engine.model,
                engine.optimizer,
                queries=measures,
                directory=Path(scratch) / "run",
                refresh=1 << 30,
                sampler=engine.plan.sampler,
            )
            with recorder:
                for batch in first:
                    step = functools.partial(engine.step, batch, around=recorder.batch)
                    times.append(_timed(engine, step)[0])
    timed = times[_WARM:] or times
    return sum(timed) / len(timed)


def _padded(work: FineTuning, indices: np.ndarray) -> int:
    lengths = [len(work.examples.tokens[i]["input_ids"]) for i in indices]
    return len(lengths) * max(lengths)


def _average_size(work: FineTuning, engine: Engine) -> float:
    per_epoch = engine.plan.sampler.steps_per_epoch(engine.n, engine.plan.batch_size)
    return float(np.mean([_padded(work, b.indices) for b in itertools.islice(engine.batches(), per_epoch)]))


def _timed_size(work: FineTuning, engine: Engine) -> float:
    first = list(itertools.islice(engine.batches(), _WARM + _TIMED))
    return float(np.mean([_padded(work, b.indices) for b in first[_WARM:] or first]))


def _replay(work: FineTuning, engine: Engine, *, cuts: list[int], evaluations: int, step: float) -> ReplayPlan:
    update = FlatUpdate(engine.parameters, engine.plan.optimizer.rule)
    options = make_replay_options(work.configuration.sensitivity)
    return ReplayPlan.estimate(
        options,
        cuts=cuts,
        queries=len(work.recipe.queries),
        batch_size=engine.plan.batch_size,
        panel_evaluations=evaluations,
        vectors=kept_vectors(update, clip_exactly=False),
        vector_bytes=update.layout.size * next(iter(engine.parameters.values())).dtype.itemsize,
        hessian=options.method(engine.model),
        training_seconds=step * engine.total_steps,
    )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Rehearsal", "rehearse"]
