"""`Recorder`: records a training loop that the user writes and owns: its live signals, and what a replay of it needs.

The model is not wrapped and the loop's arithmetic is not touched: hooks read what the user's own backward pass
computes, and step hooks of the optimizer see the gradient as the optimizer receives it. Parameters after a recorded run
equal those of the bare run bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import polars as pl
import torch
from torch import nn

from finfluence.errors import FinfluenceWarning, InputError, RecordingError
from finfluence.gradients import Direction, check_model, check_normalisations, normalisations
from finfluence.runs._batch_record import BatchRecord, StepLosses, as_id_array, check_rows, has_closure
from finfluence.runs._identity import GradientFingerprint
from finfluence.runs._live_signals import LiveSignals
from finfluence.runs._loop_writer import LoopRecord, LoopSettings
from finfluence.runs._manifest import SensitivityKind, SignalKind, describe_run, environment
from finfluence.runs._step_checks import check_resumed
from finfluence.runs._visits import EpochCounter
from finfluence.runs.live_queries import LiveQueries, Measure
from finfluence.runs.panel import NoisePanel
from finfluence.runs.plan import Precision
from finfluence.runs.sampling import Sampler
from finfluence.sensitivity import UpdateRule, learning_rates
from finfluence.signals import IdDtype, SignalStore, SignalTable, SignalWriter, open_folder


class Recorder:
    """Records a user's own training loop.

    Example:
        with Recorder(model, optimizer, queries={"validation": lambda model: loss}, directory="runs/a") as recorder:
            for ids, x, y in loader:
                with recorder.batch(ids):
                    criterion(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

    Gradient accumulation: several `batch` blocks before one `optimizer.step()`. Clipping by global norm and AMP loss
    scaling between the backward pass and the step multiply the gradient by a number, which is found and applied to the
    signals. Anything else that changes the gradient shows up as a residual of the signal identity
    Σ_i x_{i,t} = ⟨q_t, ḡ_t⟩ (method: f-INE, Panda et al. 2026, in-run form), and a warning names the likely causes.

    With sensitivity "replay" or "both" the run keeps states of the training and each micro-batch's rows, rates and
    random numbers, so that `finfluence.replay` can take its steps again and give calibrated signals. It compares the
    parameters with those stored, so that a task whose losses are not the loop's is found out.

    Args:
        model: the model under training, unwrapped.
        optimizer: torch.optim.SGD, Adam or AdamW; or another with `update_rule`.
        queries: for each query, a function of the model that returns its scalar measurement, evaluated in eval mode
            with gradients on.
        directory: the run directory, a local path or an fsspec URL; must not hold a run.
        refresh: query gradients are evaluated at every `refresh`-th step.
        samples: the sample table, a column "sample" with ids and whatever else is worth reading or grouping by; made
            of the ids that were seen where it is not given.
        id_dtype: type of the ids; taken from `samples` where that is given.
        update_rule: the pure update of an optimizer that finfluence does not know.
        batch_dim: which dimension of activations counts samples, "auto" to infer it module by module.
        rows: whether a sample is "one" entry of the model's input, or "several" rows of it (triplets, crops), whose
            number is then a multiple of the number of ids and cannot be checked against it.
        sampler: how the loop draws its batches; decides the noise formula.
        seed: kept in the run's description.
        manifest: further entries of run.json.
        exist: what to do with a run that is in the directory: refuse, or "resume" it, which drops what was recorded
            from step `start` on.
        start: index of the first step that is recorded.
        sensitivity: "live"; "replay" to keep what a replay needs, without signals, for the cost of its states; "both".
            For a replay ids are rows of the dataset, or `samples` has the dataset's rows in their order, and `flush` is
            needed beside checkpoints that the loop is resumed from.
        signals, panel: of the replay, as in `finfluence.train`.
        checkpoint_every: steps between stored states; the square root of the number of steps is about right.
        clip_norm: global norm at which the loop clips the gradient; a replay must know.
        precision: "bfloat16-autocast" where the loop's forward passes are under it; a replay must know.

    Raises:
        InputError: no queries, a measurement that has no gradient, ids that cannot be rows of a dataset.
        RecordingError: a model or optimizer that cannot be recorded correctly, or not be replayed.
        StoreError: the directory holds a run, or cannot be written; a resumed run ends before step `start`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        queries: Mapping[str, Measure],
        directory: str | os.PathLike[str],
        refresh: int = 1,
        samples: pl.DataFrame | None = None,
        id_dtype: IdDtype = "int64",
        update_rule: UpdateRule | None = None,
        batch_dim: Any = "auto",
        rows: Literal["one", "several"] = "one",
        sampler: Sampler | None = None,
        seed: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        exist: Literal["error", "resume"] = "error",
        start: int = 0,
        sensitivity: SensitivityKind = "live",
        signals: SignalKind = "batch",
        panel: NoisePanel | None = None,
        checkpoint_every: int = 32,
        clip_norm: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        if sensitivity not in get_args(SensitivityKind):
            raise InputError(
                f"unknown sensitivity {sensitivity!r}; choose one of {', '.join(get_args(SensitivityKind))}"
            )
        if not isinstance(queries, Mapping) or not all(callable(q) for q in queries.values()):
            raise InputError(
                'queries must map names to functions of the model, for example {"validation": lambda model: loss}'
            )
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model, self.optimizer, self.directory = model, optimizer, directory
        self.sampler = sampler or Sampler()
        self.live = LiveQueries(
            model, optimizer, parameters=parameters, measures=queries, refresh=refresh, update_rule=update_rule
        )
        self.parameters = self.live.parameters
        self._signals = None if sensitivity == "replay" else LiveSignals(model, self.live, batch_dim=batch_dim)
        self._samples, self._seed, self._rows = samples, seed, rows
        self._expected: int | None = None
        if samples is not None and "sample" in samples.columns:
            id_dtype = "int64" if samples["sample"].dtype.is_integer() else "str"
        self._id_dtype: IdDtype = id_dtype
        self._manifest = dict(manifest or {})
        settings = LoopSettings(signals, panel or NoisePanel(), checkpoint_every, clip_norm, precision)
        self.sensitivity: SensitivityKind = sensitivity
        self._loop: LoopRecord | None = None
        if sensitivity != "live":
            self._loop = LoopRecord(model, optimizer, settings, samples=samples, id_dtype=id_dtype)
        self._table: SignalTable = "signals" if sensitivity == "live" else "live"
        self._owned_writer = True
        self.writer: SignalWriter | None = None
        self.step = start
        self._exist: Literal["error", "resume"] = exist
        known = None if samples is None or "sample" not in samples.columns else set(samples["sample"].to_list())
        self._epochs = EpochCounter(with_replacement=self.sampler.kind != "shuffled", known=known)
        self._handles: list[Any] = []
        self._pending: list[np.ndarray] = []
        self._begun = self._empty = False
        self._normalisations: dict[str, nn.Module] = {}
        self._fingerprint: GradientFingerprint | None = None
        self._losses = StepLosses()
        self._place = (0, 0)
        self.skipped_steps = 0

    def attach(self, writer: SignalWriter, *, table: SignalTable = "signals", step: int = 0) -> None:
        """Writes into a store that the caller opened and closes, from `step` on; before `__enter__`."""
        self.writer, self._table, self.step, self._owned_writer = writer, table, step, False

    def __enter__(self) -> Self:
        check_model(self.model)
        self._normalisations = normalisations(self.model)
        if self.writer is None:
            described = describe_run(
                self.optimizer, self.sampler, seed=self._seed, sensitivity=self.sensitivity, signals="batch"
            )
            folder = open_folder(self.directory)
            if self._loop is not None:
                described |= self._loop.open(folder)
            if self._exist == "resume":
                stored = self._loop.stored() if self._loop else None
                check_resumed(folder, step=self.step, stored=stored, sensitivity=self.sensitivity)
            self.writer = SignalWriter.create(
                self.directory,
                queries=list(self.live.measures),
                id_dtype=self._id_dtype,
                manifest=described | environment() | {"refresh": self.live.refresh} | self._manifest,
                samples=self._samples,
                exist=self._exist,
            )
            if self._exist == "resume":
                self._continue(self.writer)
        if self._owned_writer and self._rows == "one":  # a caller that attaches its store has counted the losses
            self._handles = [self.model.register_forward_pre_hook(self._check_rows, with_kwargs=True)]
        self._handles += [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def _continue(self, writer: SignalWriter) -> None:
        writer.truncate_from(self.step)
        store = SignalStore.open(self.directory, partial=True)
        if self._loop is not None:
            self._loop.resume(self.step, writer)
        if self._signals is not None:
            self._signals.checks.largest_residual = float(writer.manifest.get("largest_residual") or 0.0)
            self._epochs.go_on(store.steps(), store.signals(self._table))
        elif self._loop is not None:
            self._epochs.go_on(store.steps(), self._loop.visits().lazy())
        self.skipped_steps = int(writer.manifest.get("skipped_steps") or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if self._signals is not None:
            self._signals.remove()
        if not self._owned_writer or self.writer is None:
            return
        if error is not None:
            with contextlib.suppress(Exception):
                self._finish("failed")
            return
        self._settle()
        if self._pending:
            warnings.warn(
                f"{len(self._pending)} batch(es) after step {self.step - 1} were recorded but no optimizer.step() "
                "followed; their signals are dropped",
                FinfluenceWarning,
                stacklevel=2,
            )
        if self._loop is not None:
            self._loop.cut(self.step)
        self._finish("finished")

    def _finish(self, status: Any) -> None:
        assert self.writer is not None
        if self._samples is None:
            self.writer.write_samples(self._epochs.frame(self._id_dtype), grown=self._exist == "resume")
        repeatable = self._loop is not None and status == "finished" and self.step
        loop = self._loop.describe(seed=self._seed, sampler=self.sampler) if self._loop and repeatable else {}
        self.writer.update_manifest(
            steps=self.step,
            n_samples=self._epochs.count if self._samples is None else self._samples.height,
            epochs=self._epochs.epoch + 1,
            largest_residual=self.largest_residual if self._signals else None,
            skipped_steps=self.skipped_steps,
            **loop,
        )
        self.writer.close(status)

    @contextlib.contextmanager
    def batch(
        self,
        ids: Any,
        *,
        epoch: int | None = None,
        segments: tuple[Sequence[int], int] | None = None,
        denominator: float | None = None,
    ) -> Iterator[BatchRecord]:
        """Records one forward and backward pass.

        Args:
            ids: (b,) ids of the batch's samples, in the batch's order: int64 or str.
            epoch: index of the epoch; inferred from repeated ids where it is not given.
            segments: for samples one behind the other in one row (padding-free batches): their lengths and the row's.
            denominator: what the loop divides the sum of the samples' losses by, for a replay: b for a mean (the
                default), b times the number of micro-batches where their means are divided by it, the step's tokens
                where the task's losses are sums over tokens.

        Yields:
            A `BatchRecord`.

        Raises:
            InputError: ids of the wrong type or shape, empty, or repeated within an epoch's batch.
            RecordingError: a module's activations do not have len(ids) samples, or no backward pass ran in the block.
        """
        if self.writer is None or not self._handles:
            raise RecordingError("the recorder is not open; write `with Recorder(...) as recorder:` around the loop")
        names = as_id_array(ids, self._id_dtype)
        self._settle()
        if self._begun:
            self._epochs.visit(names, step=self.step)
        else:
            self.begin_step(names, epoch=epoch)
        record = BatchRecord()
        self._expected = len(names)
        try:
            with contextlib.ExitStack() as stack:
                if self._loop is not None:
                    stack.enter_context(self._loop.part(names, denominator, segments=segments))
                if self._signals is not None:
                    stack.enter_context(self._signals.record(len(names), segments=segments))
                yield record
        finally:
            self._expected = None
        self._pending.append(names)
        self._losses.add(record, len(names))
        self._fingerprint = GradientFingerprint.of(self.parameters)

    def _check_rows(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._expected is not None and torch.is_grad_enabled():
            check_rows(self._expected, (args, kwargs))

    def begin_step(self, ids: np.ndarray, *, epoch: int | None = None, position: int | None = None) -> list[Direction]:
        """Fixes the sensitivities of the step that is about to be taken; `batch` does so where it was not called.

        Args:
            ids: (b,) ids of the step's samples as an array, possibly none (an empty Poisson batch).
            epoch: index of the epoch; inferred where it is not given.
            position: index of the batch in its epoch; counted where it is not given.

        Returns:
            The step's live sensitivities, one direction a query.

        Raises:
            RecordingError: a module couples the samples of a batch (BatchNorm put back into training mode, say).
        """
        check_normalisations(self._normalisations)
        self._settle()
        self._place = self._epochs.begin_batch(ids, step=self.step, epoch=epoch, position=position)
        if self._loop is not None:
            if self._loop.due(self.step):
                self.flush()
            self._loop.forget()
        self._begun, self._empty = True, len(ids) == 0
        return [] if self._signals is None else self._signals.begin(self.step)

    def flush(self) -> None:
        """Makes every finished step durable, e.g. beside a checkpoint of the training.

        Between steps; a run that is kept for a replay also stores the training's state, so that it can be resumed here.
        """
        if self.writer is not None:
            self.writer.flush()
        if self._loop is not None:
            self._loop.cut(self.step)

    @property
    def largest_residual(self) -> float:
        """Of the signal identity so far, relative; 0 without live signals."""
        return 0.0 if self._signals is None else self._signals.checks.largest_residual

    @property
    def last_values(self) -> np.ndarray | None:
        """(b, n_queries) float64 live signals of the last step."""
        return None if self._signals is None else self._signals.last

    def _settle(self) -> None:
        if self._pending and all(p.grad is None or not p.grad.any() for p in self.parameters.values()):
            self.skip_step()

    def _forget_step(self) -> None:
        self._losses = StepLosses()
        self._pending, self._fingerprint, self._begun, self._empty = [], None, False, False

    def skip_step(self) -> None:
        """Notes a step that was not taken: its gradient was thrown away (an AMP overflow), so signals moved nothing."""
        if not self._pending or self._fingerprint is None:
            return
        nonfinite = not bool(torch.isfinite(self._fingerprint.norm))
        if self._loop is not None:
            raise RecordingError(
                f"step {self.step} was not taken: its gradient was thrown away or is zero, which a replay cannot "
                "repeat; record live signals alone (sensitivity='live')"
            )
        size = sum(map(len, self._pending))
        self._append_step(residual=None, scale=0.0, batch_size=size, skipped=True, nonfinite=nonfinite)
        self._forget_step()
        self.step += 1
        self.skipped_steps += 1

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A closure runs the forward and backward pass inside of the step; the gradient is then read behind it.
        if not has_closure(args, kwargs):
            self._record_step()

    def _record_step(self) -> None:
        if self.writer is None:
            return
        if self._empty:
            self._append_step(residual=0.0, scale=1.0, batch_size=0)
            return
        if not self._pending or self._fingerprint is None:
            raise RecordingError(
                f"optimizer.step() at step {self.step} without a recorded batch; put every forward and backward pass "
                "inside `with recorder.batch(ids):`"
            )
        now = GradientFingerprint.of(self.parameters, self._fingerprint.names)
        scale = now.ratio(self._fingerprint)
        names, residual = np.concatenate(self._pending), None
        if self._signals is not None:
            values, residual = self._signals.of_step(names, scale=scale, step=self.step)
            self.writer.append_table(self._table, self.step, samples=names, values=values.astype(np.float32))
        if self._loop is not None:
            self._loop.check_precision(self._signals is not None and self._signals.low_precision)
            rates = learning_rates(self.optimizer)
            self._loop.end(step=self.step, place=self._place, rates=rates, scale=scale)
        self._append_step(residual=residual, scale=scale, batch_size=len(names))

    def _append_step(
        self, *, residual: float | None, scale: float, batch_size: int, skipped: bool = False, nonfinite: bool = False
    ) -> None:
        assert self.writer is not None
        epoch, position = self._place
        self.writer.append_steps(
            step=self.step,
            epoch=epoch,
            position=position,
            learning_rate=learning_rates(self.optimizer)[0],
            batch_size=batch_size,
            loss=self._losses.mean(),
            residual=residual,
            scale=scale,
            nonfinite=nonfinite,
            skipped=skipped,
        )

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if has_closure(args, kwargs):
            self._record_step()
        self._forget_step()
        self.step += 1
