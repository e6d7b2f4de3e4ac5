"""What a replay of a Hugging Face trainer's run needs to know: its losses, row by row, and what it divides them by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from finfluence.errors import InputError
from finfluence.gradients import evaluating
from finfluence.integrations._measures import count_labels, loss_of, loss_type
from finfluence.integrations._trainer import has_own_loss, is_reentrant, trainer_variables
from finfluence.integrations.text import IGNORED
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
