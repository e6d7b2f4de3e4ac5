"""Every sample's self-influence at three steps of a training that was recorded without it, from its states."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.runs._progress import ShowProgress, progress
from finfluence.runs._recording import Recording
from finfluence.runs.engine import Engine
from finfluence.runs.self_signals import SelfSignals, self_steps
from finfluence.runs.states import restore_training_state
from finfluence.signals import SELF, SignalWriter


def write_self_influence(recording: Recording, engine: Engine, writer: SignalWriter, *, show: ShowProgress) -> None:
    """Writes what `train(self_influence="all")` records on the way, if it is not there.

    Args:
        recording: of the training.
        engine: that takes its steps.
        writer: the run's open store.
        show: whether a bar is shown.

    Raises:
        InputError: the run has self-influence of the samples' own batches.
    """
    known = writer.manifest.get("self_influence", "none")
    if known == "all":
        return
    if known == "record":
        raise InputError(
            f"{recording.folder.display} has the self-influence that samples had in their batches already "
            "(self_influence='record'); leave self_influence out"
        )
    names = recording.sample_names()
    steps = sorted(self_steps(recording.steps))
    with (
        contextlib.closing(SelfSignals(engine)) as own,
        progress("self-influence", total=len(steps), done=0, show=show) as advance,
    ):
        for step in steps:
            values = _values(recording, engine, own, step)
            columns: dict[str, Any] = {"step": np.full(len(values), step), "sample": names}
            frame = pl.DataFrame(columns | {SELF: values.astype(np.float32)})
            writer.replace_part("self", f"replay-{step:09d}", frame)
            advance()
    writer.update_manifest(self_influence="all")


def _values(recording: Recording, engine: Engine, own: SelfSignals, step: int) -> np.ndarray:
    """(n,) float64 signals of all samples at a step."""
    cut = max(c for c in recording.cuts if c <= step)
    restore_training_state(engine.model, engine.optimizer, recording.states.load(cut))
    batches = engine.batches(cut)
    for batch in itertools.islice(batches, step - cut):
        engine.step(batch)
    batch = next(batches)
    engine.set_learning_rate(step)
    values = own.values(batch._replace(indices=np.arange(engine.n)))
    return values * engine.step(batch).clip_factor
