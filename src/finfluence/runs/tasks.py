"""What is trained and what is asked: per-sample losses and the measurement of a query.

A `Task` is the only thing that users write about their own model. Ready ones cover classification, regression and
causal language models. Tasks call `model(...)` and nothing else of the model, so that the retraining oracle can pass
a function in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from finfluence.errors import InputError


@runtime_checkable
class Task(Protocol):
    """The two functions that define a training problem."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) training loss of each sample, as it enters the mean over the batch."""
        ...

    def measure(self, model: Any, batch: Any) -> Tensor:
        """() the scalar that is asked about a query."""
        ...


@dataclass(frozen=True)
class Contrast:
    """A query that asks for a difference: the measurement on `first` minus `weight` times that on `second`.

    With a language model and two completions of the same prompts it is loss(first) − loss(second). The rise of the
    second completion is the fall of this number, so that μ > 0 still reads "the samples support the first".

    Attributes:
        first: a map-style dataset or a ready batch.
        second: the same, with as many samples.
        weight: of the second side, positive. What both sides share cancels with 1, and part of it with less: rows that
            teach the first completion teach something of the second, too, and 0.5 found more of them in
            `python -m benchmarks poison`.

    Raises:
        InputError: a weight that is not positive and finite.
    """

    first: Any
    second: Any
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InputError(f"the weight of a contrast is {self.weight!r}; give a positive number, 1 for a difference")


def is_function_query(query: object) -> bool:
    """Whether a query is a function of the model (a map-style dataset may be callable too, and is data)."""
    return callable(query) and not isinstance(query, (Tensor, Mapping)) and not hasattr(query, "__getitem__")


def measurement(task: Task, model: Any, query: Any) -> Tensor:
    """() what a query asks: of a batch `Task.measure`, of a `Contrast` its difference, of a function its value.

    Args:
        task: measures batches.
        model: the model, or a callable in its place.
        query: a ready batch, a Contrast of two, or a function that takes the model and returns a scalar tensor.
    """
    if isinstance(query, Contrast):
        return task.measure(model, query.first) - query.weight * task.measure(model, query.second)
    return query(model) if is_function_query(query) else task.measure(model, query)


class MeanLossTask:
    """Base of the ready tasks: the measurement is the mean loss on the query."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) training loss of each sample; subclasses define it."""
        raise NotImplementedError

    def measure(self, model: Any, batch: Any) -> Tensor:
        """() mean of `losses` on the query's samples."""
        return self.losses(model, batch).mean()


def _pair(batch: Any, task: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(f"{task} takes batches (inputs, targets), got {type(batch).__name__}; write your own Task")
    return batch[0], batch[1]


class ClassificationTask(MeanLossTask):
    """Cross-entropy on batches (x, y): model(x) gives (b, classes) logits, y is (b,) int64.

    Args:
        label_smoothing: as in torch.nn.CrossEntropyLoss.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) cross-entropy of each sample, in nats."""
        inputs, targets = _pair(batch, "ClassificationTask")
        return functional.cross_entropy(model(inputs), targets, reduction="none", label_smoothing=self.label_smoothing)


class RegressionTask(MeanLossTask):
    """Squared error on batches (x, y), averaged over the output dimensions of each sample."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) mean squared error of each sample, in squared units of the target."""
        inputs, targets = _pair(batch, "RegressionTask")
        predictions = model(inputs)
        if predictions.shape != targets.shape:
            # (b, 1) against (b,) would broadcast to (b, b) without a word
            if predictions.numel() != targets.numel():
                raise InputError(
                    f"predictions have shape {tuple(predictions.shape)} but targets {tuple(targets.shape)}; "
                    "give targets the shape of the model's output"
                )
            targets = targets.reshape(predictions.shape)
        return (
            (predictions - targets).square().flatten(1).mean(1)
            if predictions.dim() > 1
            else (predictions - targets).square()
        )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(b, t) cross-entropy of each token, in nats; 0 where its target is -100.

    Args:
        logits: (b, t, vocabulary).
        targets: (b, t) int64.
    """
    # One row of logits a token: over any other dimension a GPU's softmax takes a hundred times as long.
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    ).view_as(targets)


class CausalLMTask(MeanLossTask):
    """Next-token cross-entropy on batches {"input_ids", "labels", optional "attention_mask"}, all (b, t) int64.

    Each sample's loss is the mean over its own tokens whose label is not -100, so that long samples do not outweigh
    short ones. The model is called with input_ids and attention_mask and returns logits (b, t, vocabulary), bare or as
    an attribute `.logits`. Labels default to input_ids with padding masked.
    """

    def losses(self, model: Any, batch: Any) -> Tensor:
        """(b,) mean next-token cross-entropy of each sample, in nats per token."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise InputError('CausalLMTask takes batches with "input_ids" (and "labels"); write your own Task')
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels")
        if labels is None:
            labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        output = model(input_ids=ids) if mask is None else model(input_ids=ids, attention_mask=mask)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            seen = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise InputError(
                f"CausalLMTask needs logits of shape ({ids.shape[0]}, {ids.shape[1]}, vocabulary), the model returned "
                f"{seen}; load it with its language-model head (AutoModelForCausalLM), or write your own Task"
            )
        # The last token predicts nothing, and is ignored instead of cut off, which would copy the logits.
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
        # low-precision logits would lose the small differences between tokens
        logits = logits if logits.dtype == torch.float64 else logits.float()
        token = token_losses(logits, targets)
        counts = (targets != -100).sum(1)
        return token.sum(1) / torch.clamp(counts, min=1)


class FunctionalModel:
    """A model with other parameters, as the callable that a Task expects."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, dict(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at these parameters."""
        return functional_call(self._model, self._parameters, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a task asks of the model, from the model."""
        return getattr(self._model, name)
