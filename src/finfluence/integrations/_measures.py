"""Queries of a language model as measurements: losses of completions, contrasts of two, or batches of the trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finfluence.errors import InputError
from finfluence.gradients import query_gradient
from finfluence.integrations._rows import undisturbed
from finfluence.integrations.text import (
    IGNORED,
    context_length,
    pad_batch,
    pad_token_id,
    tokenize_completion,
    tokenize_text,
)
from finfluence.runs.data import model_device, to_device
from finfluence.runs.tasks import Contrast, is_function_query

Measure = Callable[[nn.Module], Tensor]


class Sum:
    """A measurement that is the sum of terms, differentiated term by term so that only one graph is alive.

    Args:
        terms: functions of the model that return () tensors.
    """

    def __init__(self, terms: Sequence[Measure]) -> None:
        self.terms = list(terms)

    def parts(self, model: nn.Module) -> Iterator[Tensor]:
        """The terms, one after the other."""
        for term in self.terms:
            yield term(model)

    def __call__(self, model: nn.Module) -> Tensor:
        """() their sum."""
        return torch.stack([term(model) for term in self.terms]).sum()


@dataclass(frozen=True)
class CompletionTerm:
    """weight · Σ over a few rows of the mean loss of a row's labels.

    Attributes:
        batch: {"input_ids", "attention_mask", "labels"}, (b, t).
        weight: on each row.
    """

    batch: Mapping[str, Tensor]
    weight: float

    def __call__(self, model: nn.Module) -> Tensor:
        """() in nats per token, times the weight."""
        batch = to_device(self.batch, model_device(model))
        targets = batch["labels"][:, 1:]
        used = (targets != IGNORED).any(0).nonzero().squeeze(1)  # logits of the prompt are most of the memory
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if _takes(model, "logits_to_keep"):
            logits = model(**inputs, logits_to_keep=used).logits
        else:
            output = model(**inputs)
            logits = (output if isinstance(output, Tensor) else output.logits)[:, used]
        targets = targets[:, used]
        token = functional.cross_entropy(
            logits.transpose(1, 2).float(), targets, reduction="none", ignore_index=IGNORED
        )
        return self.weight * (token.sum(1) / (targets != IGNORED).sum(1)).sum()


@dataclass(frozen=True)
class BatchTerm:
    """weight · the model's own loss on a batch of the trainer's collator.

    Attributes:
        batch: what the model is called with.
        weight: share of the batch in the query.
    """

    batch: Mapping[str, Any]
    weight: float

    def __call__(self, model: nn.Module) -> Tensor:
        """() as the model defines its loss."""
        loss = loss_of(model(**to_device(dict(self.batch), model_device(model))))
        if loss is None:
            raise InputError(
                f"{type(model).__name__} returned no loss for a batch with {', '.join(self.batch)}: its forward "
                "ignores labels, or the rows have none; give the query as a function of the model"
            )
        return self.weight * loss


@dataclass(frozen=True)
class QueryContext:
    """What queries of rows are made with.

    Attributes:
        model: for its context length and device.
        tokenizer: of the trainer; None if it has none.
        collate: the trainer's collator.
        columns: names that the trainer's own rows have; others are dropped before collating. None keeps all.
        batch_size: rows that are differentiated at once.
        max_length: longest query in tokens; None for the model's context.
    """

    model: nn.Module
    tokenizer: Any
    collate: Callable[[list[Any]], Any]
    columns: Sequence[str] | None
    batch_size: int
    max_length: int | None = None


def measure_of(query: Any, name: str, context: QueryContext) -> Measure:
    """The measurement that a query asks for.

    Args:
        query: a function of the model; rows (a datasets.Dataset, a list of dicts, a map-style dataset), whose mean loss
            is meant; or a `Contrast` of two such.
        name: for messages.
        context: how rows become batches.

    Raises:
        InputError: rows that cannot be tokenised or collated, or are longer than the context.
    """
    if isinstance(query, Contrast):
        terms = _terms(query.first, f"{name} (first)", context)
        return Sum(terms + [_scaled(t, -query.weight) for t in _terms(query.second, f"{name} (second)", context)])
    return query if is_function_query(query) else Sum(_terms(query, name, context))


def check_measures(model: nn.Module, parameters: Mapping[str, Tensor], measures: Mapping[str, Measure]) -> None:
    """Evaluate every measurement once with its gradient, so that a bad one is refused before training starts."""
    for name, measure in measures.items():
        try:
            query_gradient(model, parameters, measure)
        except InputError as error:
            raise InputError(f"query {name!r}: {error}") from None


def loss_of(output: Any) -> Tensor | None:
    """The loss among a model's outputs, None where there is none."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    else:
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.ndim == 0 else None


def _scaled(term: Measure, factor: float) -> Measure:
    assert isinstance(term, (CompletionTerm, BatchTerm))
    return type(term)(term.batch, factor * term.weight)


def _terms(query: Any, name: str, context: QueryContext) -> list[Measure]:
    if isinstance(query, Mapping) or not (hasattr(query, "__len__") and hasattr(query, "__getitem__")):
        raise InputError(
            f"query {name!r} is {type(query).__name__}; give a function of the model, rows (a dataset or a list of "
            "dicts), or fi.Contrast(first, second)"
        )
    if len(query) == 0:
        raise InputError(f"query {name!r} has no rows; give at least one")
    with undisturbed():
        rows = [query[i] for i in range(len(query))]
    if isinstance(rows[0], Mapping) and "input_ids" not in rows[0]:
        tokens = [_tokens(row, f"row {i} of query {name!r}", context) for i, row in enumerate(rows)]
        if all(t is not None for t in tokens):
            return _completion_terms([t for t in tokens if t is not None], context)
    return _batch_terms(rows, name, context)


def _tokens(row: Mapping[str, Any], label: str, context: QueryContext) -> dict[str, list[int]] | None:
    """A row of text as tokens; None where it has no text that finfluence knows how to read."""
    text = "messages" in row or {"prompt", "completion"} <= set(row) or isinstance(row.get("text"), str)
    if not text:
        return None
    if context.tokenizer is None:
        raise InputError(f"{label} is text but the trainer has no tokenizer; pass processing_class=tokenizer to it")
    length = context.max_length or context_length(context.model)
    if "messages" in row:
        messages = row["messages"]
        if not messages or messages[-1].get("role") != "assistant":
            raise InputError(f"{label} does not end with an assistant's message; its loss is what the query measures")
        return tokenize_completion(context.tokenizer, messages[:-1], messages[-1:], max_length=length, row=label)
    if "prompt" in row:
        return tokenize_completion(context.tokenizer, row["prompt"], row["completion"], max_length=length, row=label)
    return tokenize_text(context.tokenizer, row["text"], max_length=length, row=label)


def _completion_terms(rows: Sequence[Mapping[str, Any]], context: QueryContext) -> list[Measure]:
    for i, row in enumerate(rows):
        if len(row["input_ids"]) < 2 or all(label == IGNORED for label in row["labels"][1:]):
            raise InputError(f"row {i} of a query has a single token, which nothing predicts; give a longer text")
    pad = pad_token_id(context.tokenizer)
    size = context.batch_size
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [CompletionTerm(pad_batch(chunk, pad), 1.0 / len(rows)) for chunk in chunks]


def _batch_terms(rows: list[Any], name: str, context: QueryContext) -> list[Measure]:
    if context.columns is not None and isinstance(rows[0], Mapping):
        rows = [{k: v for k, v in row.items() if k in context.columns} for row in rows]
    limit = context.max_length or context_length(context.model)
    batches, sizes = [], []
    for i in range(0, len(rows), context.batch_size):
        chunk = rows[i : i + context.batch_size]
        try:
            with undisturbed():
                batch = dict(context.collate(chunk))
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"the trainer's collator cannot make a batch of query {name!r} ({type(error).__name__}: {error}); give "
                "its rows the columns of the training set, or text (messages; prompt and completion; text)"
            ) from error
        tokens = batch.get("input_ids")
        longest = int(batch.get("max_length_q", tokens.shape[-1] if isinstance(tokens, Tensor) else 0))
        if limit is not None and longest > limit:
            raise InputError(f"query {name!r} has {longest} tokens, more than the context of {limit}; shorten it")
        batches.append(batch)
        sizes.append(_labels_in(batch, context.model, default=len(chunk)))
    if sum(sizes) == 0:
        raise InputError(f"query {name!r} has no label that counts (all are {IGNORED}); give rows with a completion")
    return [BatchTerm(b, n / sum(sizes)) for b, n in zip(batches, sizes, strict=True) if n]


def _labels_in(batch: Mapping[str, Any], model: nn.Module, *, default: int) -> int:
    """Labels that the model's loss averages over, by which the losses of several batches make one."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return default
    count = count_labels(batch, shifted=loss_type(model) == "ForCausalLM")
    return default if count is None else count


def count_labels(batch: Mapping[str, Any], *, shifted: bool) -> int | None:
    """Labels of a batch that count; None where it has none.

    Args:
        batch: what the model is called with.
        shifted: whether the first label of a row predicts nothing.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    if shifted and labels.ndim >= 2:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def loss_type(model: nn.Module) -> str | None:
    """How Transformers names the loss of a model's class; None for a model that is not of its families."""
    base = _base(model)
    named = getattr(base, "loss_type", None)
    # what Transformers itself falls back to, for classes whose name says nothing (GPT2LMHeadModel)
    return "ForCausalLM" if named is None and hasattr(base, "loss_function") else named


def _base(model: nn.Module) -> Any:
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(_base(model).forward).parameters
