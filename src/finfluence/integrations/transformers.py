"""`InfluenceCallback`: records a Hugging Face `Trainer` (Transformers 5) or TRL `SFTTrainer` while it trains.

With sensitivity "replay" or "both" the run can be replayed afterwards, for signals that are calibrated.

Nothing of the trainer, its dataset or its collator is changed. Row ids come from the order in which the trainer's own
loader asks for rows; signals from hooks on the untouched modules; the step from the trainer's own optimizer. Training
is bit for bit that without the callback.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from finfluence.errors import FinfluenceWarning, InputError, RecordingError
from finfluence.integrations import _rows
from finfluence.integrations._checks import check_arguments, check_size, check_trainable
from finfluence.integrations._contents import Contents
from finfluence.integrations._layers import register_layers
from finfluence.integrations._measures import Measure, QueryContext, check_measures, loss_of, measure_of
from finfluence.integrations._microbatch import MicroBatches
from finfluence.integrations._order import BatchOrder
from finfluence.integrations._trainer import check_loss, describe_training, is_reentrant, prepared_rows, running_trainer
from finfluence.integrations._trainer_replay import Denominators, TrainerReplays, loop_settings
from finfluence.runs import NoisePanel, Recorder
from finfluence.runs._manifest import SensitivityKind
from finfluence.runs.data import tensors_of


class InfluenceCallback(TrainerReplays, TrainerCallback):
    """Records every training row's signals while a Hugging Face trainer runs.

    Example:
        Trainer(..., callbacks=[InfluenceCallback({"behaviour": rows}, directory="runs/a", id_column="id")])

    Live signals rank. For calibrated ones the run is kept so that it can be replayed:

        callback = InfluenceCallback({"behaviour": rows}, directory="runs/a", sensitivity="replay")
        trainer = Trainer(..., callbacks=[callback])
        trainer.train()
        run = callback.replay(trainer)

    Works with LoRA and DoRA adapters and full fine-tuning, gradient accumulation and clipping, token-normalised losses
    (each row's share is its own token losses over the step's tokens), padding, packing (the packed row is the sample),
    gradient checkpointing and bfloat16 autocast, in one process.

    Args:
        queries: name → what is measured: a function of the model that returns a scalar; rows, whose mean loss is meant
            (text: "messages", "prompt" and "completion", or "text", with the prompt masked and the chat template
            applied; otherwise rows like the training set's, through the trainer's collator); or
            `fi.Contrast(first, second)` of two such sets of rows. Evaluated in eval mode with gradients on.
        directory: the run directory, a local path or fsspec URL.
        id_column: column of the trainer's dataset that names the rows; None for their index.
        ids: the names themselves, one a row, where they are in no column.
        samples: table with a column "sample" and whatever is worth reading or grouping by; by default the dataset's
            columns of single values.
        refresh: query gradients are evaluated at every `refresh`-th step.
        query_batch_size: rows of a query that are differentiated at once; less takes less memory.
        max_query_length: longest query in tokens; None for the model's context.
        check: "content" compares some batches' tokens with the dataset's rows, "count" only counts rows (for collators
            that rewrite tokens).
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
        queries: Mapping[str, Any],
        directory: str | os.PathLike[str],
        *,
        id_column: str | None = None,
        ids: Sequence[Any] | None = None,
        samples: pl.DataFrame | None = None,
        refresh: int = 1,
        query_batch_size: int = 4,
        max_query_length: int | None = None,
        check: Literal["content", "count"] = "content",
        exist: Literal["error", "resume"] = "error",
        manifest: Mapping[str, Any] | None = None,
        sensitivity: SensitivityKind = "live",
        signals: Literal["batch", "full"] = "batch",
        panel: NoisePanel | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        if not isinstance(queries, Mapping) or not queries:
            raise InputError('queries must map names to what is measured, for example {"behaviour": rows}')
        for name, value in {"refresh": refresh, "query_batch_size": query_batch_size}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if check not in ("content", "count") or exist not in ("error", "resume"):
            raise InputError(f"check={check!r}, exist={exist!r}; use 'content' or 'count', 'error' or 'resume'")
        self.queries, self.directory = dict(queries), directory
        self.id_column, self.ids, self.samples = id_column, ids, samples
        self.refresh, self.query_batch_size, self.max_query_length = refresh, query_batch_size, max_query_length
        self.check, self.manifest = check, dict(manifest or {})
        self.exist: Literal["error", "resume"] = exist
        self.sensitivity: SensitivityKind = sensitivity
        self._loop: dict[str, Any] = {"signals": signals, "panel": panel}
        self._every = checkpoint_every
        self.recorder: Recorder | None = None
        self._order: BatchOrder | None = None
        self._batches: MicroBatches | None = None
        self._names = np.empty(0, dtype=np.int64)
        self._in_epoch = False
        self._contents = Contents(None, check)
        self._denominators: Denominators | None = None
        self._skip = self._epoch = self._updates = 0

    # What follows is called by the trainer.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks everything, opens the run and begins to follow; nothing is trained if anything is wrong."""
        self.close("failed")
        with self._closing():
            self._begin(args, state, kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the epochs."""
        self._epoch += 1
        self._in_epoch = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes that the epoch's loop ended in good order."""
        self._in_epoch = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fixes the step's sensitivities; they are evaluated here, outside of whatever surrounds the forward pass."""
        with self._closing():
            recorder, order, batches = self._parts()
            order.skip(self._skip)
            self._skip = 0
            batches.expected, batches.completed = True, 0
            position = state.global_step - self._epoch * self._updates
            recorder.begin_step(self._names[order.peek()], epoch=self._epoch, position=position)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the micro-batch was recorded."""
        with self._closing():
            self._check_recorded()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the micro-batch was recorded; the recorder sees the clipped gradient in the optimizer's step."""
        with self._closing():
            self._check_recorded()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the signals durable before a checkpoint is written."""
        with self._closing():
            recorder, _, batches = self._parts()
            batches.expected = False
            if control.should_save:
                recorder.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the signals durable beside a checkpoint."""
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the run."""
        self.close("finished")

    # What follows is ours.

    def close(self, status: Literal["finished", "failed"] = "failed") -> None:
        """Take every hook away and close the run; after an error in the trainer, to be rid of the hooks at once."""
        order, batches, recorder = self._order, self._batches, self.recorder
        self._order = self._batches = self.recorder = None
        self._in_epoch = False
        if batches is not None:
            batches.remove()
        if order is not None:
            order.detach()
        if recorder is not None:
            if status == "finished":
                recorder.__exit__(None, None, None)
            else:
                error = RecordingError("training did not finish")
                recorder.__exit__(type(error), error, None)

    def _begin(self, args: Any, state: Any, given: Mapping[str, Any]) -> None:
        register_layers()
        model, loader, trainer = given["model"], given["train_dataloader"], running_trainer()
        check_arguments(args)
        check_trainable(model)
        self._order = BatchOrder(loader, abandoned=self._abandoned)
        dataset = self._order.dataset
        original = dataset if trainer is None else trainer.train_dataset
        rows, accumulate = len(dataset), args.gradient_accumulation_steps
        check_size(rows, args.per_device_train_batch_size * accumulate)
        packed = bool(getattr(args, "packing", False)) or "seq_lengths" in (
            getattr(dataset, "column_names", None) or ()
        )
        self._names = self._row_names(original, args, rows, packed=packed)
        samples = _rows.sample_table(
            original if not packed else None, self._names, self.samples, id_column=self.id_column
        )
        loop: dict[str, Any] = {}
        if self.sensitivity != "live":
            loop = self._loop | loop_settings(args, steps=state.max_steps, every=self._every)
            samples = _rows.in_order(samples, self._names)
            with _rows.undisturbed():
                batch = dict(self._order.collate([dataset[0]])) if _rows.is_table(dataset) else None
                self._denominators = Denominators(trainer, model, batch)
        context, measures = self._measures(model, loader, dataset, given.get("processing_class"))
        check_loss(model, trainer, dataset, context.collate)
        self._updates = max(-(-len(loader) // accumulate), 1)
        self._epoch = state.global_step // self._updates - 1
        skipped = 0 if args.ignore_data_skip else state.global_step % self._updates * accumulate
        self._skip, self._contents = skipped, Contents(dataset, self.check)
        recorder = Recorder(
            model,
            _torch_optimizer(given["optimizer"]),
            queries=measures,
            directory=self.directory,
            refresh=self.refresh,
            samples=samples,
            batch_dim=0 if is_reentrant(args) else "auto",
            rows="several",
            sampler=self._order.sampler,
            seed=args.seed if args.data_seed is None else args.data_seed,
            manifest=describe_training(args, self._order, packed=packed, check=self.check) | self.manifest,
            exist=self.exist,
            start=state.global_step,
            sensitivity=self.sensitivity,
            **loop,
        )
        self.recorder = recorder  # from here on `close` takes its hooks away
        check_measures(model, recorder.parameters, measures)
        recorder.__enter__()
        self._batches = MicroBatches(model, self._batch, self._note_loss)
        self._order.attach()

    def _measures(
        self, model: nn.Module, loader: Any, dataset: Any, tokenizer: Any
    ) -> tuple[QueryContext, dict[str, Measure]]:
        """How rows become batches, and what is measured."""
        context = QueryContext(
            model,
            tokenizer,
            getattr(loader, "base_dataloader", loader).collate_fn,
            getattr(dataset, "column_names", None),
            self.query_batch_size,
            self.max_query_length,
        )
        return context, {name: measure_of(query, name, context) for name, query in self.queries.items()}

    def _row_names(self, dataset: Any, args: Any, rows: int, *, packed: bool) -> np.ndarray:
        if packed:
            if self.id_column is not None:
                raise InputError(
                    f"packing puts several rows into one, so column {self.id_column!r} cannot name them; leave "
                    "id_column out (packed rows are then named by their index), or set packing=False"
                )
            warnings.warn(
                "the training set is packed: influence is of packed rows, named by their index, not of the rows that "
                "were packed; set packing=False to have one number a row",
                FinfluenceWarning,
                stacklevel=2,
            )
        elif self.id_column is None and self.ids is None:
            return prepared_rows(dataset, args, rows)
        return _rows.row_ids(dataset, self.id_column, self.ids, rows)

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """The recorder's block for the micro-batch that the model is being called with."""
        with self._closing():
            recorder, order, _ = self._parts()
            contents, rows = self._contents, order.next()
            tensor = _rows_of(args, kwargs)
            ids = self._names[rows]
            if tensor is None or tensor.shape[0] == len(rows):
                contents.check_batch(kwargs.get("input_ids"), rows, step=recorder.step)
                shares = self._denominators
                return recorder.batch(ids, denominator=None if shares is None else shares.of(kwargs))
            if tensor.shape[0] == 1 and tensor.ndim >= 2:
                return recorder.batch(ids, segments=contents.segments(tensor, rows, step=recorder.step))
            raise RecordingError(
                f"the batch at step {recorder.step} has {tensor.shape[0]} rows for the {len(rows)} that the sampler "
                "asked for; the collator must make one row of each"
            )

    def _note_loss(self, record: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = loss_of(output)
        if loss is not None:
            record.loss = loss.detach().clone()  # trainers rescale it in place
            record.loss_is = "share" if kwargs.get("num_items_in_batch") is not None else "mean"

    def _check_recorded(self) -> None:
        recorder, _, batches = self._parts()
        if batches.running or not batches.completed:
            raise RecordingError(
                f"no backward pass through {type(recorder.model).__name__} ended in a micro-batch of step "
                f"{recorder.step}; the trainer must call the model that it was given, and backpropagate the result"
            )
        batches.completed = 0

    def _parts(self) -> tuple[Recorder, BatchOrder, MicroBatches]:
        if self.recorder is None or self._order is None or self._batches is None:
            raise RecordingError("the recording was closed; make a new trainer to record another run")
        return self.recorder, self._order, self._batches

    def _abandoned(self) -> None:
        """The loop left an epoch without its end: an exception that the trainer tells nobody about."""
        if self._in_epoch:
            with contextlib.suppress(Exception):
                self.close("failed")

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close("failed")
            raise


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, out of Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input whose first dimension counts rows."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    return next((t for t in tensors_of((args, kwargs)) if t.ndim), None)
