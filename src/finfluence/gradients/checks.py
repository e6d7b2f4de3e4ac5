"""What a model must not contain for per-sample gradients to exist or recording to leave training unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finfluence.errors import RecordingError


def normalisations(model: nn.Module) -> dict[str, nn.Module]:
    """The batch normalisations of a model by name: what `check_normalisations` looks at."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def check_normalisations(found: Mapping[str, nn.Module]) -> None:
    """Raise if a batch normalisation uses the batch's statistics now; `model.train()` may have made it.

    Args:
        found: of `normalisations`; walking through a large model at every step would take a tenth of the step.

    Raises:
        RecordingError: as of `check_model`.
    """
    for name, module in found.items():
        if module.training or getattr(module, "running_mean", None) is None:
            mode = "in training mode" if module.training else "without running statistics"
            raise RecordingError(
                f"module {name!r} is a {type(module).__name__} {mode}, which couples the samples of a batch: "
                "call .eval() on it after model.train(), or use GroupNorm instead"
            )


def check_model(model: nn.Module) -> None:
    """Raise if a module couples the samples of a batch, or changes its weights during a forward pass.

    Args:
        model: in the mode in which it will be recorded.

    Raises:
        RecordingError: batch normalisation that uses the batch's statistics, an embedding with scale_grad_by_freq
            (the gradient of one sample depends on the others) or max_norm (a forward pass changes the weights).
    """
    check_normalisations(normalisations(model))
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.scale_grad_by_freq:
                raise RecordingError(
                    f"module {name!r} is a {kind} with scale_grad_by_freq=True, which couples the samples of a batch: "
                    "set it to False"
                )
            if module.max_norm is not None:
                raise RecordingError(
                    f"module {name!r} is a {kind} with max_norm={module.max_norm}, which changes its weights in "
                    "forward passes: set it to None and normalise the weights after the optimizer step"
                )
