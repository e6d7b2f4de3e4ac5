"""Settings of a Hugging Face trainer under which its run cannot be recorded, each with what to do instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from finfluence.errors import InputError, RecordingError


def check_arguments(args: Any) -> None:
    """Raise for training arguments that spread a batch over processes or restart the run by themselves.

    Raises:
        RecordingError: more than one process or GPU, FSDP, DeepSpeed, a compiled model, automatic batch sizes.
    """
    problems = [
        (getattr(args, "world_size", 1) > 1, f"{getattr(args, 'world_size', 1)} processes", "train in one process"),
        (getattr(args, "n_gpu", 0) > 1, f"{getattr(args, 'n_gpu', 0)} GPUs (DataParallel)", "set CUDA_VISIBLE_DEVICES"),
        (bool(getattr(args, "fsdp", None)), "FSDP", "leave fsdp out"),
        (bool(getattr(args, "deepspeed", None)), "DeepSpeed", "leave deepspeed out"),
        (
            bool(getattr(args, "torch_compile", False)),
            "torch_compile=True",
            "set it to False (hooks need eager modules)",
        ),
        (
            bool(getattr(args, "auto_find_batch_size", False)),
            "auto_find_batch_size=True",
            "set the batch size yourself",
        ),
    ]
    for found, what, remedy in problems:
        if found:
            raise RecordingError(f"training with {what} cannot be recorded; {remedy}")


def check_trainable(model: nn.Module) -> None:
    """Raise for a wrapped model or one without trainable parameters.

    Raises:
        RecordingError: DataParallel, a compiled model, nothing to train.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise RecordingError(f"the model is wrapped in {type(model).__name__}; train it in one process, uncompiled")
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        adapters = getattr(model, "peft_config", None)
        what = f"the adapter {next(iter(adapters))!r}" if adapters else "the model"
        raise RecordingError(
            f"{what} has no trainable parameters (0 of {len(parameters)} tensors require gradients); load adapters "
            "with is_trainable=True, or call requires_grad_(True) on what is to be trained"
        )


def check_size(rows: int, batch: int) -> None:
    """Raise for fewer rows than an optimizer step takes: every step would see all of them.

    Args:
        rows: of the training set.
        batch: of one step, accumulation included.

    Raises:
        InputError: rows < batch.
    """
    if rows < batch:
        raise InputError(
            f"the training set has {rows} rows, fewer than the {batch} of one optimizer step: every step "
            "would see all of them, so none can be compared; lower the batch size or the accumulation"
        )
