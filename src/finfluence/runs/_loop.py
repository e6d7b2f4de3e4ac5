"""The loop of a recorded training run: steps, the panel beside them, checkpoints between them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from finfluence.runs._progress import ShowProgress, progress
from finfluence.runs.engine import Engine, StepResult
from finfluence.runs.panel import NoisePanel, panel_signals
from finfluence.runs.recorder import Recorder
from finfluence.runs.sampling import Batch
from finfluence.runs.self_signals import SelfSignals
from finfluence.runs.states import StateStore, restore_training_state, training_state
from finfluence.runs.watch import WatchedSubsets
from finfluence.signals import Folder, SignalWriter


class RecordingLoop:
    """Trains an engine's model to the end and records what the run's sensitivity asks for.

    Args:
        engine: the training.
        writer: the run's open store.
        directory: the run directory, where checkpoints go.
        keep: "all" stored states, for a replay, or the "last" one, to resume from.
        recorder: records live signals; None where only a replay's states are wanted.
        panel: the noise panel evaluated on the way; None for none.
        watched: subsets whose observations are recorded; None for none.
        own: records self-influence; None for none.
        own_steps: steps at which that of every sample is recorded; None for every step's own samples.
        names: (n,) ids of the dataset's rows.
        interval: steps between checkpoints.
    """

    def __init__(
        self,
        engine: Engine,
        writer: SignalWriter,
        *,
        directory: Folder,
        keep: Literal["all", "last"],
        recorder: Recorder | None,
        panel: NoisePanel | None,
        watched: WatchedSubsets | None,
        own: SelfSignals | None,
        own_steps: Collection[int] | None = None,
        names: np.ndarray,
        interval: int,
    ) -> None:
        self.engine, self.writer, self.recorder, self.keep = engine, writer, recorder, keep
        self.directory, self.states = directory, StateStore(directory)
        self.panel, self.watched, self.own, self.names, self.interval = panel, watched, own, names, interval
        self.own_steps = own_steps
        self.members = panel.members(engine.n, seed=engine.plan.seed) if panel else np.empty(0, np.int64)
        self.own_seconds = 0.0

    def run(self, start: int, *, show: ShowProgress) -> None:
        """Trains from step `start` to the end of the plan, then stores the final state."""
        engine = self.engine
        with (
            self.recorder or contextlib.nullcontext(),
            progress("recording", total=engine.total_steps, done=start, show=show) as advance,
        ):
            for batch in engine.batches(start):
                if batch.step % self.interval == 0:
                    self._checkpoint(batch.step)
                self._step(batch)
                advance()
        self._checkpoint(engine.total_steps)

    def resume(self) -> int:
        """Goes back to the last stored state and drops what was recorded after it.

        Returns:
            The step to go on with.
        """
        stored = self.states.steps()
        start = stored[-1] if stored else 0
        if stored:
            restore_training_state(self.engine.model, self.engine.optimizer, self.states.load(start))
            if self.watched is not None:
                self.watched.restore(start, self.directory)
        self.writer.truncate_from(start)
        return start

    def _checkpoint(self, step: int) -> None:
        # Signals first: a resumed run starts at a state and drops the signals after it, so none may be missing before.
        self.writer.flush()
        if self.watched is not None:
            self.watched.save(step, self.directory)
        self.states.save(step, training_state(self.engine.model, self.engine.optimizer))
        if self.watched is not None:
            self.watched.keep_only(step, self.directory)
        if self.keep == "last":
            self.states.keep_only(step)

    def _step(self, batch: Batch) -> None:
        # Sensitivities depend on this step's learning rate, and are taken before its forward pass.
        self.engine.set_learning_rate(batch.step)
        judged = self._judged(batch)
        own = None
        if self.own is not None and judged is not None:
            began = time.perf_counter()
            own = self.own.values(judged)
            self.own_seconds += time.perf_counter() - began
        result = self._bare_step(batch) if self.recorder is None else self._recorded_step(batch, self.recorder)
        if own is not None and judged is not None:
            names = self.names[judged.indices]
            self.writer.append_table("self", batch.step, samples=names, values=own * result.clip_factor)

    def _judged(self, batch: Batch) -> Batch | None:
        """The samples whose self-influence is recorded at a step, as a batch of its weights."""
        if self.own_steps is None:
            return batch
        return batch._replace(indices=np.arange(self.engine.n)) if batch.step in self.own_steps else None

    def _recorded_step(self, batch: Batch, recorder: Recorder) -> StepResult:
        directions = recorder.begin_step(self.names[batch.indices], epoch=batch.epoch, position=batch.position)
        if self._on_grid(batch):
            values = panel_signals(self.engine, self.members, directions, step=batch.step) / batch.denominator
            self.writer.append_panel(batch.step, batch.epoch, batch.position, self.names[self.members], values)
        if self.watched is not None:
            self.watched.before_step(batch, directions)
        result = self.engine.step(batch, around=functools.partial(self._around, batch))
        if self.watched is not None:
            self.watched.after_step(batch, recorder.last_values, self.writer)
        return result

    def _around(self, batch: Batch, indices: np.ndarray) -> Any:
        assert self.recorder is not None
        return self.recorder.batch(self.names[indices], epoch=batch.epoch)

    def _bare_step(self, batch: Batch) -> StepResult:
        result = self.engine.step(batch)
        self.writer.append_steps(
            step=batch.step,
            epoch=batch.epoch,
            position=batch.position,
            learning_rate=self.engine.learning_rate(batch.step),
            batch_size=len(batch.indices),
            loss=result.loss,
            residual=None,
            scale=result.clip_factor,
            nonfinite=False,
            skipped=False,
        )
        return result

    def _on_grid(self, batch: Batch) -> bool:
        return self.panel is not None and self.panel.has(batch, self.engine)
