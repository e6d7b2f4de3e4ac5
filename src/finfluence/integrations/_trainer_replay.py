"""What a replay of a Hugging Face trainer's run needs to know: its losses, row by row, and what it divides them by."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from finfluence.errors import InputError
from finfluence.gradients import evaluating
from finfluence.integrations import _rows
from finfluence.integrations._layers import register_layers
from finfluence.integrations._measures import Measure, QueryContext, count_labels, loss_of, loss_type
from finfluence.integrations._trainer import has_own_loss, is_reentrant, trainer_variables
from finfluence.integrations.text import IGNORED
from finfluence.runs import ReplayOptions, Run, Task, leave_out, replay
from finfluence.runs._progress import ShowProgress
from finfluence.runs.plan import Precision
from finfluence.runs.tasks import token_losses
from finfluence.runs.training import checkpoint_interval

_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")
_ROWS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForVideoClassification")


class TrainerTask:
    """The losses of a trainer's rows, in sums: over a row's tokens, or of the row itself for a classifier.

    The sum over a micro-batch, divided by what `denominator` says, is the loss that the trainer differentiates.

    Args:
        kind: of loss, as Transformers names it after the model's class.

    Raises:
        InputError: a loss that does not fall into rows.
    """

    def __init__(self, kind: str | None) -> None:
        if kind not in (*_SHIFTED, *_UNSHIFTED, *_ROWS):
            raise InputError(
                f"the loss of a model of type {kind} has no rows that finfluence knows; replay it with task=, whose "
                "losses are the rows' own, or record live signals alone (sensitivity='live')"
            )
        self.kind = kind

    def losses(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """(b,) Σ of the row's cross-entropies, in nats."""
        if not isinstance(batch.get("labels"), Tensor):
            raise InputError(f"a batch of the trainer has {', '.join(batch)} and no labels; replay it with task=")
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
        logits, labels = output.logits, batch["labels"]
        if self.kind in _ROWS:
            return functional.cross_entropy(logits, labels.view(-1), reduction="none")
        logits = logits.float()  # as Transformers does, also of float64
        if self.kind in _SHIFTED:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return token_losses(logits, labels).sum(1)

    def measure(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """() Σ of the losses over all labels, divided by their number."""
        return self.losses(model, batch).sum() / max(1, _labels(self.kind, batch) or 0)


class Denominators:
    """What a trainer divides the sum of a micro-batch's losses by.

    Callbacks are not told; the trainer's own methods, which the model is being called from, have it in a variable.

    Args:
        trainer: that runs; None if it is somebody else's.
        model: under training.
        batch: one of the trainer's, for a look at whether the model's loss follows the number of items that it is
            given; None where there is none to be had.
    """

    def __init__(self, trainer: Trainer | None, model: nn.Module, batch: Mapping[str, Any] | None) -> None:
        self._kind, self._followed = loss_type(model), True
        if trainer is None or batch is None or not trainer.model_accepts_loss_kwargs or has_own_loss(trainer):
            return
        with evaluating(model), torch.no_grad():
            inputs = trainer._prepare_inputs(dict(batch))
            found = [loss_of(model(**inputs, num_items_in_batch=torch.tensor(count))) for count in (1, 2)]
        one, two = (math.nan if loss is None else float(loss) for loss in found)
        self._followed = abs(one - 2 * two) <= 1e-3 * abs(one)

    def of(self, batch: Mapping[str, Any]) -> float | None:
        """That of the micro-batch that the model is called with; None where it is not known."""
        found = trainer_variables("num_items_in_batch")
        if found is None:
            return None
        items, labels = found["num_items_in_batch"], _labels(self._kind, batch)
        if items is not None and self._followed:
            return max(1.0, float(items))
        if labels is None:
            return None
        # a trainer that gave the number to a model that does not look at it does not divide by the micro-batches
        count = 1 if items is not None else found["self"].current_gradient_accumulation_steps
        return float(max(1, labels) * count)


def _labels(kind: str | None, batch: Mapping[str, Any]) -> int | None:
    """Labels that a mean loss is taken over."""
    return count_labels(batch, shifted=kind in _SHIFTED)


@contextlib.contextmanager
def plain_forward(model: Any) -> Iterator[None]:
    """A block in which the model's forward is its own, without the autocast that Accelerate put around it.

    The replay puts the recorded precision around it itself, but for the differences of its Hessian products.
    """
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def loop_settings(args: Any, *, steps: int, every: int | None) -> dict[str, Any]:
    """What `Recorder` is to know of a trainer's loop.

    Args:
        args: the training arguments.
        steps: optimizer steps of the whole training.
        every: steps between stored states; None for the square root of the number of steps.

    Raises:
        InputError: settings under which a run cannot be replayed.
    """
    if getattr(args, "fp16", False):
        raise InputError("scaled float16 gradients cannot be replayed; use bf16=True, or sensitivity='live'")
    if is_reentrant(args):
        raise InputError(
            "a replay cannot differentiate through reentrant checkpointing; set use_reentrant=False in "
            "gradient_checkpointing_kwargs, or sensitivity='live'"
        )
    clip = getattr(args, "max_grad_norm", 0.0) or None
    precision: Precision = "bfloat16-autocast" if getattr(args, "bf16", False) else "float32"
    return {
        "clip_norm": clip,
        "precision": precision,
        "checkpoint_every": checkpoint_interval(steps, refresh=1, every=every),
    }


def task_of(trainer: Trainer, model: nn.Module) -> TrainerTask:
    """The task whose losses a trainer's are.

    Raises:
        InputError: the trainer computes a loss of its own.
    """
    own = [
        (getattr(trainer, "compute_loss_func", None) is not None, "a compute_loss_func"),
        (getattr(trainer, "label_smoother", None) is not None, "label smoothing"),
        (getattr(trainer.args, "loss_type", None) not in (None, "nll"), "a loss_type of its own"),
    ]
    for found, what in own:
        if found:
            raise InputError(
                f"the trainer has {what}; replay it with task=, whose losses are what it sums up over the rows"
            )
    return TrainerTask(loss_type(model))


class TrainerReplays(abc.ABC):
    """What a callback does with a trainer's finished run: take its steps again.

    Attributes:
        directory: of the run.
    """

    directory: Any

    @abc.abstractmethod
    def _measures(
        self, model: nn.Module, loader: Any, dataset: Any, tokenizer: Any
    ) -> tuple[QueryContext, dict[str, Measure]]:
        """How rows become batches, and what is measured."""

    def replay(
        self,
        trainer: Trainer,
        *,
        task: Task | None = None,
        options: ReplayOptions | None = None,
        self_influence: Literal["none", "all"] = "none",
        show_progress: ShowProgress = "auto",
    ) -> Run:
        """Walks the finished run backwards, for calibrated signals (`finfluence.replay`).

        In the process that trained, or in a new one with a callback of the same arguments and a trainer of the same
        model, data, collator and training arguments; a replay that was killed goes on.

        Args:
            trainer: whose training was recorded with sensitivity "replay" or "both"; its model ends with the parameters
                of the finished training.
            task: the rows' losses, whose sum over a micro-batch the trainer divides by the number of labels; needed
                for losses other than the model's own cross-entropy.
            options: of the replay.
            self_influence: "all" for run.influence(query, relative=True), see `finfluence.replay`.
            show_progress: "auto" shows the plan and a bar on a terminal's standard error; "never" is silent.

        Returns:
            The run.

        Raises:
            InputError: a loss that needs a task.
            ReplayError: the run is not one to replay, or its steps come out otherwise than recorded.
        """
        again = self._recorded(trainer, task)
        with plain_forward(trainer.model):
            return replay(
                self.directory, **again, options=options, self_influence=self_influence, show_progress=show_progress
            )

    def leave_out(
        self,
        trainer: Trainer,
        *,
        subsets: Mapping[Any, Any] | None = None,
        groups: str | None = None,
        task: Task | None = None,
        show_progress: ShowProgress = "auto",
    ) -> pl.DataFrame:
        """Influence of subsets by taking the recorded steps again without each (`finfluence.leave_out`).

        Args:
            trainer: as of `replay`, which must have been done; so is task.
            subsets: sample ids by name.
            groups: or a column of the sample table.
            task: the rows' losses.
            show_progress: "auto" or "never".

        Returns:
            One row a query and subset (or group), as of `finfluence.leave_out`.

        Raises:
            InputError: a run that is not replayed, or what `finfluence.leave_out` refuses.
            ReplayError: the run's steps come out otherwise than recorded.
        """
        again = self._recorded(trainer, task)
        with plain_forward(trainer.model):
            return leave_out(self.directory, **again, subsets=subsets, groups=groups, show_progress=show_progress)

    def _recorded(self, trainer: Trainer, task: Task | None) -> dict[str, Any]:
        """What takes the recorded steps again: task, model, data and queries."""
        register_layers()
        model: Any = trainer.model
        task = task or task_of(trainer, model)
        with _rows.undisturbed():
            loader = trainer.get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)
        context, measures = self._measures(model, loader, base.dataset, trainer.processing_class)
        model.train()
        return {
            "task": task,
            "model": model,
            "dataset": base.dataset,
            "queries": measures,
            "collate": context.collate,
        }
