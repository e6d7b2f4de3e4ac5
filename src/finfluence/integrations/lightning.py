"""`InfluenceCallback`: records a Lightning `Trainer` with automatic optimisation while it trains.

Nothing of the module, its data or its optimizer is changed; training is bit for bit that without the callback.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finfluence.errors import InputError, RecordingError
from finfluence.gradients import evaluating
from finfluence.integrations import _rows
from finfluence.integrations._checks import check_size, check_trainable
from finfluence.integrations._measures import check_measures
from finfluence.integrations._order import BatchOrder
from finfluence.runs import NoisePanel, Recorder, ReplayOptions, Run, Sampler, Task, leave_out, replay
from finfluence.runs._manifest import SensitivityKind
from finfluence.runs._progress import ShowProgress
from finfluence.runs.data import Collate
from finfluence.runs.training import checkpoint_interval

Query = Callable[[Any], Tensor]


class InfluenceCallback(Callback):
    """Records the live signals of every training sample while a Lightning trainer runs.

    Example:
        queries = {"validation": lambda module: functional.cross_entropy(module(x), y)}
        Trainer(callbacks=[InfluenceCallback(queries, directory="runs/a")]).fit(module, loader)

    Live signals rank. For calibrated ones the run is kept so that it can be replayed:

        callback = InfluenceCallback(queries, directory="runs/a", sensitivity="replay")
        Trainer(callbacks=[callback]).fit(module, loader)
        run = callback.replay(module, fi.ClassificationTask())

    Works with gradient accumulation and clipping, schedules and mixed precision, on one device and with one optimizer.

    Args:
        queries: name → function of the LightningModule that returns a scalar; evaluated in eval mode, in the trainer's
            precision, with gradients on.
        directory: the run directory, a local path or fsspec URL.
        id_fn: reads the (b,) ids of a batch out of it; None to follow the loader's own order.
        ids: names of the dataset's rows where the order is followed; None for their index.
        id_dtype: type of the ids that `id_fn` returns.
        samples: table with a column "sample" and whatever is worth reading or grouping by.
        refresh: query gradients are evaluated at every `refresh`-th step.
        exist: what to do with a run in the directory: refuse, or "resume" it with the trainer's checkpoint.
        manifest: further entries of run.json.
        sensitivity: "live"; "replay" to keep the training's states and what its steps did for `replay`, without
            signals, for the cost of writing the states; or "both".
        signals: of the replay, "batch" or "full", as in `finfluence.train`.
        panel: the replay's noise panel.
        checkpoint_every: steps between stored states; None for the square root of their number.

    Raises:
        InputError: queries or options of another form.
    """

    def __init__(
        self,
        queries: Mapping[str, Query],
        directory: str | os.PathLike[str],
        *,
        id_fn: Callable[[Any], Any] | None = None,
        ids: Sequence[Any] | None = None,
        id_dtype: Literal["int64", "str"] = "int64",
        samples: pl.DataFrame | None = None,
        refresh: int = 1,
        exist: Literal["error", "resume"] = "error",
        manifest: Mapping[str, Any] | None = None,
        sensitivity: SensitivityKind = "live",
        signals: Literal["batch", "full"] = "batch",
        panel: NoisePanel | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        if not isinstance(queries, Mapping) or not queries or not all(callable(q) for q in queries.values()):
            raise InputError('queries must map names to functions of the module, e.g. {"validation": lambda m: loss}')
        if id_fn is not None and ids is not None:
            raise InputError("both id_fn and ids were given; give one of them")
        self.queries, self.directory = dict(queries), directory
        self.id_fn, self.ids, self.samples = id_fn, ids, samples
        self.id_dtype: Literal["int64", "str"] = id_dtype
        self.exist: Literal["error", "resume"] = exist
        self.refresh, self.manifest = refresh, dict(manifest or {})
        self.sensitivity: SensitivityKind = sensitivity
        self._loop: dict[str, Any] = {"signals": signals, "panel": panel}
        self._every = checkpoint_every
        self._data: tuple[Any, Any] = (None, None)
        self.recorder: Recorder | None = None
        self._order: BatchOrder | None = None
        self._names: np.ndarray | None = None
        self._block: contextlib.ExitStack | None = None
        self._record: Any = None

    # What follows is called by the trainer.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks what can be checked, and begins to follow a loader that was given to `fit`."""
        self._close("failed")
        _check_trainer(trainer, pl_module)
        source = getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)
        if self.id_fn is None and isinstance(source, DataLoader):
            with self._closing():
                self._follow(source)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the run; nothing is trained if anything is wrong."""
        with self._closing():
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens the recorder's block for the batch."""
        with self._closing():
            if self.recorder is None:
                raise RecordingError("the recording was closed; make a new callback to record another run")
            ids = self.id_fn(batch) if self.id_fn is not None else self._next_ids()
            block = contextlib.ExitStack()
            # Lightning divides the mean by the number of accumulated batches, also where an epoch's last step has fewer
            shared = float(len(ids) * trainer.accumulate_grad_batches)
            record = self.recorder.batch(ids, epoch=trainer.current_epoch, denominator=shared)
            self._record = block.enter_context(record)
            self._block = block

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Notes the loss; Lightning has divided it by the number of accumulated batches."""
        if self._block is not None:
            self._record.loss, self._record.loss_is = loss.detach().clone(), "share"

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the block before the gradient is clipped."""
        with self._closing():
            block, self._block = self._block, None
            if block is not None:
                block.close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Checks that the batch was recorded."""
        with self._closing():
            self._check_recorded()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks that the batch was recorded, and notes a step that the precision plugin did not take."""
        with self._closing():
            self._check_recorded()
            if self.recorder is not None and not trainer.fit_loop._should_accumulate():
                self.recorder.skip_step()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the signals durable beside a checkpoint."""
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the run."""
        self._close("finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the run as failed."""
        self._close("failed")

    # What follows is ours.

    def replay(
        self,
        module: LightningModule,
        task: Task,
        *,
        dataset: Any = None,
        collate: Collate | None = None,
        options: ReplayOptions | None = None,
        self_influence: Literal["none", "all"] = "none",
        show_progress: ShowProgress = "auto",
    ) -> Run:
        """Walks the finished run backwards, for calibrated signals (`finfluence.replay`).

        Args:
            module: that was trained; ends with the parameters of the finished training.
            task: the samples' losses, whose mean over a batch `training_step` returns. It is given the trained
                network: the module's child that holds all trained parameters, or the module itself.
            dataset: of the training loader; by default the one that was followed.
            collate: makes a batch of a list of samples; by default that loader's.
            options: of the replay.
            self_influence: "all" for run.influence(query, relative=True), see `finfluence.replay`.
            show_progress: "auto" shows the plan and a bar on a terminal's standard error; "never" is silent.

        Returns:
            The run.

        Raises:
            InputError: no dataset.
            ReplayError: the run is not one to replay, or its steps come out otherwise than recorded.
        """
        return replay(
            self.directory,
            **self._recorded(module, task, dataset, collate),
            options=options,
            self_influence=self_influence,
            show_progress=show_progress,
        )

    def leave_out(
        self,
        module: LightningModule,
        task: Task,
        *,
        subsets: Mapping[Any, Any] | None = None,
        groups: str | None = None,
        dataset: Any = None,
        collate: Collate | None = None,
        show_progress: ShowProgress = "auto",
    ) -> pl.DataFrame:
        """Influence of subsets by taking the recorded steps again without each (`finfluence.leave_out`).

        Args:
            module: as of `replay`, which must have been done; so are task, dataset and collate.
            task: the samples' losses.
            subsets: sample ids by name.
            groups: or a column of the sample table.
            dataset: of the training loader.
            collate: makes a batch.
            show_progress: "auto" or "never".

        Returns:
            One row a query and subset (or group), as of `finfluence.leave_out`.

        Raises:
            InputError: a run that is not replayed, or what `finfluence.leave_out` refuses.
            ReplayError: the run's steps come out otherwise than recorded.
        """
        again = self._recorded(module, task, dataset, collate)
        return leave_out(self.directory, **again, subsets=subsets, groups=groups, show_progress=show_progress)

    def _recorded(self, module: LightningModule, task: Task, dataset: Any, collate: Collate | None) -> dict[str, Any]:
        """What takes the recorded steps again."""
        if dataset is None:
            dataset, collate = self._data[0], collate or self._data[1]
        if dataset is None:
            raise InputError("the callback followed no loader in this process; give the training loader's dataset=")
        module.train()
        # the module holds the network, so what is asked of it is asked of the replayed parameters
        queries = {name: lambda _, query=query: query(module) for name, query in self.queries.items()}
        model = _recorded_module(module)
        return {"task": task, "model": model, "dataset": dataset, "queries": queries, "collate": collate}

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = _recorded_module(pl_module)
        check_trainable(model)
        if len(trainer.optimizers) != 1:
            raise RecordingError(f"{len(trainer.optimizers)} optimizers cannot be recorded; use one")
        loader = trainer.train_dataloader
        if self.id_fn is None and self._order is None:
            self._follow(loader)
            assert self._order is not None
            _follow_started(trainer, self._order, loader)
        samples, sampler, rows = self.samples, Sampler(), None
        if self._order is not None and self._names is not None:
            samples, rows = _rows.sample_table(None, self._names, self.samples), len(self._names)
            sampler = self._order.sampler
        loop: dict[str, Any] = {}
        if self.sensitivity != "live":
            loop = self._loop | _loop_settings(trainer, every=self._every)
            if samples is not None and self._names is not None:
                samples = _rows.in_order(samples, self._names)
        batch = (getattr(loader, "batch_size", None) or 0) * trainer.accumulate_grad_batches
        if rows is not None and batch:
            check_size(rows, batch)
        measures = {name: self._measure(query, trainer, pl_module) for name, query in self.queries.items()}
        recorder = Recorder(
            model,
            trainer.optimizers[0],
            queries=measures,
            directory=self.directory,
            refresh=self.refresh,
            samples=samples,
            id_dtype=self.id_dtype,
            sampler=sampler,
            manifest={
                "trainer": {
                    "precision": str(trainer.precision),
                    "accumulate_grad_batches": trainer.accumulate_grad_batches,
                    "gradient_clip_val": trainer.gradient_clip_val,
                    "module": type(pl_module).__name__,
                },
                "batch_size": batch or None,
                "unit": "row",
            }
            | self.manifest,
            exist=self.exist,
            start=trainer.global_step,
            sensitivity=self.sensitivity,
            **loop,
        )
        self.recorder = recorder  # from here on `_close` takes its hooks away
        check_measures(model, recorder.parameters, measures)
        recorder.__enter__()

    def _check_recorded(self) -> None:
        if self._block is not None:
            raise RecordingError(
                "a batch had no backward pass (training_step returned None?); leave such samples out of the dataset, "
                "because skipped batches have no influence to measure"
            )

    def _follow(self, loader: Any) -> None:
        order = BatchOrder(loader, abandoned=lambda: None)
        self._names = _rows.row_ids(order.dataset, None, self.ids, len(order.dataset))
        order.attach()
        self._order, self._data = order, (order.dataset, order.collate)

    def _next_ids(self) -> np.ndarray:
        assert self._order is not None
        assert self._names is not None
        return self._names[self._order.next()]

    def _measure(self, query: Query, trainer: Trainer, pl_module: LightningModule) -> Callable[[nn.Module], Tensor]:
        def measure(model: nn.Module) -> Tensor:
            with evaluating(pl_module), trainer.precision_plugin.forward_context():
                return query(pl_module)

        return measure

    def _close(self, status: Literal["finished", "failed"]) -> None:
        order, block, recorder = self._order, self._block, self.recorder
        self._order = self._block = self.recorder = None
        error = None if status == "finished" else RecordingError("training did not finish")
        kind = None if error is None else type(error)
        if block is not None:
            with contextlib.suppress(Exception):
                block.__exit__(kind, error, None)
        if order is not None:
            order.detach()
        if recorder is not None:
            recorder.__exit__(kind, error, None)

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._close("failed")
            raise


def _loop_settings(trainer: Trainer, *, every: int | None) -> dict[str, Any]:
    """What `Recorder` is to know of a trainer's loop.

    Raises:
        InputError: settings under which a run cannot be replayed.
    """
    precision = str(trainer.precision)
    if precision.startswith("16"):
        raise InputError('scaled float16 gradients cannot be replayed; use precision="bf16-mixed", or live signals')
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise InputError("gradients clipped by value cannot be replayed; clip by norm, or record live signals")
    steps = trainer.estimated_stepping_batches
    return {
        "clip_norm": trainer.gradient_clip_val or None,
        "precision": "bfloat16-autocast" if precision == "bf16-mixed" else "float32",
        "checkpoint_every": checkpoint_interval(int(steps) if math.isfinite(steps) else 1024, refresh=1, every=every),
    }


def _check_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise RecordingError(
            "manual optimisation cannot be recorded by the callback; set automatic_optimization=True, or use "
            "finfluence.Recorder in training_step"
        )
    if trainer.world_size > 1:
        raise RecordingError(f"training in {trainer.world_size} processes cannot be recorded; use devices=1")
    if any(hasattr(module, "_orig_mod") for module in pl_module.modules()):
        raise RecordingError("a compiled module cannot be recorded; leave torch.compile out")


def _recorded_module(pl_module: LightningModule) -> nn.Module:
    """The network itself: training_step calls it, while nobody may ever call the LightningModule's own forward."""
    trainable = {id(p) for p in pl_module.parameters() if p.requires_grad}
    for child in pl_module.children():
        if trainable and trainable <= {id(p) for p in child.parameters()}:
            return child
    return pl_module


def _follow_started(trainer: Trainer, order: BatchOrder, loader: Any) -> None:
    """Follow an iteration that the trainer began before it told anybody of the loader."""
    combined = getattr(getattr(trainer.fit_loop, "_data_fetcher", None), "iterator", None)
    started = getattr(getattr(combined, "_iterator", None), "iterators", [None])[0]
    if getattr(started, "_num_yielded", 1) or getattr(loader, "num_workers", 0):
        raise InputError(
            "the order of a loader that the module makes itself cannot be followed with num_workers > 0; give the "
            "loader to trainer.fit(module, loader), or pass id_fn to read ids from the batch"
        )
    started._sampler_iter = order.observe(started._sampler_iter)
