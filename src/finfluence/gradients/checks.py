"""What a model must not contain for per-sample gradients to exist or recording to leave training unchanged."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finfluence.errors import RecordingError


def check_model(model: nn.Module) -> None:
    """Raise if a module couples the samples of a batch, or changes its weights during a forward pass.

    Args:
        model: in the mode in which it will be recorded.

    Raises:
        RecordingError: batch normalisation that uses the batch's statistics, an embedding with scale_grad_by_freq
            (the gradient of one sample depends on the others) or max_norm (a forward pass changes the weights).
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            mode = "in training mode" if module.training else "without running statistics"
            raise RecordingError(
                f"module {name!r} is a {kind} {mode}, which couples the samples of a batch: "
                "call .eval() on it after model.train(), or use GroupNorm instead"
            )
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
