"""What has to be learnt from a Hugging Face trainer itself, because its callbacks are not told."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from finfluence.errors import InputError
from finfluence.gradients import evaluating
from finfluence.integrations._measures import loss_of
from finfluence.integrations._order import BatchOrder
from finfluence.integrations._rows import is_table, undisturbed

_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "learning_rate",
    "warmup_steps",
    "max_grad_norm",
    "weight_decay",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
    "data_seed",
    "packing",
    "padding_free",
    "max_length",
)


def describe_training(args: Any, order: BatchOrder, *, packed: bool, check: str) -> dict[str, Any]:
    """Entries of run.json about a trainer's training.

    Args:
        args: the training arguments.
        order: of its batches.
        packed: whether a row is several of the user's.
        check: how batches are compared with the dataset's rows.
    """
    settings = {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)}
    plain = {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in settings.items()}
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return {
        "trainer": {
            "arguments": plain | {"schedule": schedule},
            "row_sampler": type(order.row_sampler).__name__,
            "order_check": check if is_table(order.dataset) else "count",
        },
        "unit": "packed row" if packed else "row",
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
    }


def running_trainer() -> Trainer | None:
    """The trainer that is calling. Its callbacks are not told who it is, and its dataset still has the id column."""
    found = trainer_variables("self")
    return None if found is None else found["self"]


def trainer_variables(name: str) -> dict[str, Any] | None:
    """Variables of the innermost method of a calling trainer that has one of that name; None if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals
        if name in found and isinstance(found.get("self"), Trainer):
            return found
        frame = frame.f_back
    return None


def has_own_loss(trainer: Trainer) -> bool:
    """Whether a trainer makes something else of the model's output than its loss."""
    own = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    return own or type(trainer).compute_loss is not Trainer.compute_loss


def prepared_rows(dataset: Any, args: Any, rows: int) -> np.ndarray:
    """(rows,) int64 index of every row in the dataset that was given to the trainer.

    TRL's trainer prepares its dataset: a row whose labels are all cut away is dropped, and `shuffle_dataset` reorders.
    What it keeps is an Arrow table of the rows given, behind a list of the rows taken.
    """
    taken = getattr(dataset, "_indices", None)
    if not hasattr(args, "shuffle_dataset") or taken is None:
        return np.arange(rows, dtype=np.int64)
    if args.max_length is None and args.shuffle_dataset:
        raise InputError("shuffle_dataset=True hides which row is which; name the rows with id_column")
    if args.max_length is None:
        return np.arange(rows, dtype=np.int64)
    return np.asarray(taken.column(0).to_numpy(), dtype=np.int64)


def is_reentrant(args: Any) -> bool:
    """Whether checkpointed layers run without a graph first, so that nothing can be learnt from it about layouts."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            return bool((getattr(args, f"{name}_kwargs", None) or {}).get("use_reentrant"))
    return False


def check_loss(model: nn.Module, trainer: Trainer | None, dataset: Any, collate: Any) -> None:
    """Raise if the trainer will look for a loss in the model's output and there is none.

    Raises:
        InputError: the model returned none for the first row.
    """
    if trainer is None or has_own_loss(trainer) or not is_table(dataset):
        return
    with undisturbed():
        batch = dict(collate([dataset[0]]))
        with evaluating(model), torch.no_grad():
            output = model(**trainer._prepare_inputs(batch))
    if loss_of(output) is None:
        raise InputError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(batch)}: its forward ignores "
            "labels, or the data has none; return a loss from forward, or pass compute_loss_func to the trainer"
        )
