"""`Recorder`: records the live signals of a training loop that the user writes and owns.

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
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from finfluence.errors import FinfluenceWarning, InputError, RecordingError, StoreError
from finfluence.gradients import Direction, HookedDerivatives, check_model, check_normalisations, normalisations
from finfluence.runs._batch_record import BatchRecord, as_id_array, has_closure
from finfluence.runs._identity import GradientFingerprint, identity_residual, tolerance
from finfluence.runs._manifest import describe_run, environment
from finfluence.runs._visits import EpochCounter
from finfluence.runs.data import tensors_of
from finfluence.runs.live_queries import LiveQueries, Measure
from finfluence.runs.sampling import Sampler
from finfluence.sensitivity import UpdateRule, learning_rates
from finfluence.signals import IdDtype, SignalTable, SignalWriter


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

    Raises:
        InputError: no queries, a measurement that has no gradient.
        RecordingError: a model or optimizer that cannot be recorded correctly.
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
    ) -> None:
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
        self._hooks = HookedDerivatives(model, self.parameters, batch_dim=batch_dim)
        self._samples, self._seed, self._rows = samples, seed, rows
        self._expected: int | None = None
        if samples is not None and "sample" in samples.columns:
            id_dtype = "int64" if samples["sample"].dtype.is_integer() else "str"
        self._id_dtype: IdDtype = id_dtype
        self._manifest = dict(manifest or {})
        self._table: SignalTable = "signals"
        self._owned_writer = True
        self.writer: SignalWriter | None = None
        self.step = start
        self._exist: Literal["error", "resume"] = exist
        known = set(samples["sample"].to_list()) if samples is not None and "sample" in samples.columns else None
        self._epochs = EpochCounter(with_replacement=self.sampler.kind != "shuffled", known=known)
        self._handles: list[Any] = []
        self._pending: list[tuple[np.ndarray, Tensor]] = []
        self.directions: list[Direction] = []
        self.last_values: np.ndarray | None = None
        self._begun = self._empty = False
        self._normalisations: dict[str, nn.Module] = {}
        self._fingerprint: GradientFingerprint | None = None
        self._losses: list[tuple[float, int]] = []
        self._shares: list[float] = []
        self._place = (0, 0)
        self._rates: tuple[float, ...] = ()
        self._warned: set[str] = set()
        self.largest_residual = 0.0
        self.skipped_steps = 0

    def attach(self, writer: SignalWriter, *, table: SignalTable = "signals", step: int = 0) -> None:
        """Writes into a store that the caller opened and closes, from `step` on; before `__enter__`."""
        self.writer, self._table, self.step, self._owned_writer = writer, table, step, False

    def __enter__(self) -> Self:
        check_model(self.model)
        self._normalisations = normalisations(self.model)
        if self.writer is None:
            described = describe_run(
                optimizer=self.optimizer, sampler=self.sampler, seed=self._seed, sensitivity="live", signals="batch"
            )
            self.writer = SignalWriter.create(
                self.directory,
                queries=list(self.live.measures),
                id_dtype=self._id_dtype,
                manifest=described | environment() | {"refresh": self.live.refresh} | self._manifest,
                samples=self._samples,
                exist=self._exist,
            )
            self._continue(self.writer)
        if self._owned_writer and self._rows == "one":  # a caller that attaches its store has counted the losses
            self._handles = [self.model.register_forward_pre_hook(self._check_rows, with_kwargs=True)]
        self._handles += [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def _continue(self, writer: SignalWriter) -> None:
        if self._exist == "resume":
            last = -1 if writer.last_step is None else writer.last_step
            if last + 1 < self.step:
                writer.close("failed")
                raise StoreError(
                    f"{writer.directory} was recorded up to step {last} and training resumes at step {self.step}; "
                    "resume from a checkpoint at or before its end"
                )
            writer.truncate_from(self.step)
            self.largest_residual = float(writer.manifest.get("largest_residual") or 0.0)
            self.skipped_steps = int(writer.manifest.get("skipped_steps") or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._hooks.remove()
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
        self._finish("finished")

    def _finish(self, status: Any) -> None:
        assert self.writer is not None
        if self._samples is None:
            self.writer.write_samples(self._epochs.frame(self._id_dtype))
        self.writer.update_manifest(
            steps=self.step,
            n_samples=self._epochs.count if self._samples is None else self._samples.height,
            epochs=self._epochs.epoch + 1,
            largest_residual=self.largest_residual,
            skipped_steps=self.skipped_steps,
        )
        self.writer.close(status)

    @contextlib.contextmanager
    def batch(
        self, ids: Any, *, epoch: int | None = None, segments: tuple[Sequence[int], int] | None = None
    ) -> Iterator[BatchRecord]:
        """Records one forward and backward pass.

        Args:
            ids: (b,) ids of the batch's samples, in the batch's order: int64 or str.
            epoch: index of the epoch; inferred from repeated ids where it is not given.
            segments: for samples one behind the other in one row (padding-free batches): their lengths and the row's.

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
            with self._hooks.record(self.directions, len(names), segments=segments) as recording:
                yield record
        finally:
            self._expected = None
        self._pending.append((names, recording.values))
        if record.loss is not None and record.loss_is == "share":
            self._shares.append(float(record.loss))
        elif record.loss is not None:
            self._losses.append((float(record.loss), len(names)))
        self._fingerprint = GradientFingerprint.of(self.parameters)

    def _check_rows(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._expected is None or not torch.is_grad_enabled():
            return
        shapes = [tuple(t.shape) for t in tensors_of((args, kwargs)) if t.dim()]
        if shapes and not any(self._expected in shape[:2] for shape in shapes):
            raise RecordingError(
                f"{self._expected} ids were given for a model input of shape {shapes[0]}; give one id for each of its "
                f'{shapes[0][0]} rows, or say rows="several" if a sample has several'
            )

    def begin_step(self, ids: np.ndarray, *, epoch: int | None = None, position: int | None = None) -> list[Direction]:
        """Fixes the sensitivities of the step that is about to be taken; `batch` does so where it was not called.

        Args:
            ids: (b,) ids of the step's samples as an array, possibly none (an empty Poisson batch).
            epoch: index of the epoch; inferred where it is not given.
            position: index of the batch in its epoch; counted where it is not given.

        Returns:
            The step's sensitivities, one direction a query.

        Raises:
            RecordingError: a module couples the samples of a batch (BatchNorm put back into training mode, say).
        """
        check_normalisations(self._normalisations)
        self._settle()
        self._place = self._epochs.begin_batch(ids, step=self.step, epoch=epoch, position=position)
        self.directions = self.live.directions(self.step)
        self._rates = learning_rates(self.optimizer)
        self._begun, self._empty = True, len(ids) == 0
        return self.directions

    def flush(self) -> None:
        """Makes every finished step durable, e.g. beside a checkpoint of the training."""
        if self.writer is not None:
            self.writer.flush()

    def _settle(self) -> None:
        if self._pending and all(p.grad is None or not p.grad.any() for p in self.parameters.values()):
            self.skip_step()

    def _forget_step(self) -> None:
        self._shares = []
        self._pending, self._losses, self._fingerprint, self._begun, self._empty = [], [], None, False, False

    def skip_step(self) -> None:
        """Notes a step that was not taken: its gradient was thrown away (an AMP overflow), so signals moved nothing."""
        if not self._pending or self._fingerprint is None:
            return
        nonfinite = not bool(torch.isfinite(self._fingerprint.norm))
        size = sum(len(names) for names, _ in self._pending)
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
        names = np.concatenate([names for names, _ in self._pending])
        values = torch.cat([values for _, values in self._pending]).double() * scale
        residual = identity_residual(values, self.directions, self.parameters)
        signals = values.cpu().numpy()
        if not np.isfinite(signals).all():
            row = int(np.flatnonzero(~np.isfinite(signals).all(axis=1))[0])
            raise RecordingError(
                f"the signal of sample {names[row].item()!r} at step {self.step} is {signals[row].min()}; the loss or "
                "the query is not finite: lower the learning rate, clip the gradient, or use GradScaler.step, which "
                "skips such steps"
            )
        self._check_rates()
        self._check_residual(residual)
        self.last_values = signals
        self.writer.append_table(self._table, self.step, samples=names, values=signals.astype(np.float32))
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
            loss=self._mean_loss(),
            residual=residual,
            scale=scale,
            nonfinite=nonfinite,
            skipped=skipped,
        )

    def _mean_loss(self) -> float | None:
        if self._shares:
            return sum(self._shares)
        count = sum(b for _, b in self._losses)
        return sum(loss * b for loss, b in self._losses) / count if count else None

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if has_closure(args, kwargs):
            self._record_step()
        self._forget_step()
        self.step += 1

    def _check_residual(self, residual: float) -> None:
        self.largest_residual = max(self.largest_residual, residual)
        limit = tolerance(self.parameters, low_precision=self._hooks.low_precision)
        if residual <= limit:
            return
        uncovered = self._hooks.uncovered()
        cause = (
            f"parameter {uncovered[0]!r} is used outside its module, where hooks do not see it"
            if uncovered
            else "the gradient was changed by something other than one factor (clipping by value, per-group clipping, "
            "a regulariser in the loss, noise), or the precision is too low"
        )
        self._warn_once(
            "residual",
            f"the signal identity is off by {residual:.1e} at step {self.step} (limit {limit:.0e}): {cause}; "
            "the signals miss that part of the gradient",
        )

    def _check_rates(self) -> None:
        rates = learning_rates(self.optimizer)
        if rates != self._rates:
            self._warn_once(
                "rates",
                f"the learning rate of step {self.step} changed from {self._rates[0]:g} to {rates[0]:g} after its "
                "batch began; set it before `recorder.batch`, because the step's sensitivity depends on it",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, FinfluenceWarning, stacklevel=6)  # out of our frames and torch's step
