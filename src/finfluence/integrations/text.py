"""From text to batches: prompt tokens masked, chat templates applied by the tokenizer, rows padded.

The tokenizer is any that Transformers loads (`__call__`, `apply_chat_template`, `pad_token_id`); this module imports
nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from finfluence.errors import InputError

IGNORED = -100  # the label that cross-entropy skips
Messages = Sequence[Mapping[str, str]]


def tokenize_completion(
    tokenizer: Any,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    max_length: int | None = None,
    eos: bool = True,
    row: str = "the query",
) -> dict[str, list[int]]:
    """The tokens of a prompt and its completion, with the prompt's labels masked.

    A list of messages goes through the tokenizer's chat template, prompt with the generation prompt and completion as
    the assistant's turn; strings are put together as they are.

    Args:
        tokenizer: of the model.
        prompt: text, or messages such as [{"role": "user", "content": "…"}].
        completion: text (with a message prompt: the assistant's answer), or messages.
        max_length: longest row that is allowed, in tokens; None for no limit.
        eos: whether a string completion ends with the end-of-sequence token. A chat template decides for itself.
        row: how messages name the row.

    Returns:
        {"input_ids", "labels"}: lists of the same length; labels are -100 on the prompt.

    Raises:
        InputError: no chat template, an empty completion, a template whose prompt is not a prefix of the whole
            conversation, or more than `max_length` tokens.
    """
    if _is_empty(completion):
        raise InputError(f"{row} has an empty completion; give the answer whose loss is measured")
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise InputError(
                f"{row} has a text prompt and a completion of type {type(completion).__name__}; "
                "give both as text, or both as messages"
            )
        before = tokenizer(prompt)["input_ids"] if prompt else _start(tokenizer)
        before = _without_end(list(before), tokenizer)
        after = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        if eos and tokenizer.eos_token_id is not None:
            after.append(tokenizer.eos_token_id)
    else:
        before, after = _chat(tokenizer, prompt, completion, row)
    if not after:
        raise InputError(f"{row} has a completion without tokens, {completion!r}; give the answer whose loss is asked")
    if max_length is not None and len(before) + len(after) > max_length:
        raise InputError(
            f"{row} has {len(before) + len(after)} tokens, more than the context of {max_length}; shorten its prompt"
        )
    return {"input_ids": before + after, "labels": [IGNORED] * len(before) + after}


def tokenize_text(
    tokenizer: Any, text: str, *, max_length: int | None = None, eos: bool = True, row: str = "the query"
) -> dict[str, list[int]]:
    """The tokens of a plain text, every one of them a label.

    Args:
        tokenizer: of the model.
        text: not empty.
        max_length: longest row that is allowed, in tokens.
        eos: whether the row ends with the end-of-sequence token.
        row: how messages name the row.

    Raises:
        InputError: no text, or more than `max_length` tokens.
    """
    if not text.strip():
        raise InputError(f"{row} has no text; drop it or give its text")
    ids = _without_end(list(tokenizer(text)["input_ids"]), tokenizer)
    if eos and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if max_length is not None and len(ids) > max_length:
        raise InputError(f"{row} has {len(ids)} tokens, more than the context of {max_length}; shorten it")
    return {"input_ids": ids, "labels": list(ids)}


def pad_batch(
    rows: Sequence[Mapping[str, Any]], pad_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Rows of tokens as one batch.

    Args:
        rows: each with "input_ids" and "labels", lists or 1-d tensors; labels default to the tokens.
        pad_id: token that fills up; its labels are -100 and its attention 0.
        side: where it goes.

    Returns:
        {"input_ids", "attention_mask", "labels"}: (b, longest) int64 each.

    Raises:
        InputError: no rows, an empty row, or labels of another length.
    """
    if not rows:
        raise InputError("a batch of 0 rows was asked for; give at least one row")
    tokens = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    targets = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long) for row in rows]
    for i, (t, y) in enumerate(zip(tokens, targets, strict=True)):
        if t.ndim != 1 or not len(t) or t.shape != y.shape:
            raise InputError(
                f"row {i} has input_ids of shape {tuple(t.shape)} and labels of shape {tuple(y.shape)}; "
                "give one label a token, at least one token"
            )
    return {
        "input_ids": _padded(tokens, pad_id, side),
        "attention_mask": _padded([torch.ones_like(t) for t in tokens], 0, side),
        "labels": _padded(targets, IGNORED, side),
    }


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's padding token, else its end-of-sequence token, else 0; masked everywhere, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def context_length(model: Any) -> int | None:
    """Positions that the model was built for, None where its configuration does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _padded(rows: Sequence[Tensor], fill: int, side: str) -> Tensor:
    longest = max(len(r) for r in rows)
    batch = torch.full((len(rows), longest), fill, dtype=torch.long)
    for i, r in enumerate(rows):
        if side == "right":
            batch[i, : len(r)] = r
        else:
            batch[i, longest - len(r) :] = r
    return batch


def _is_empty(completion: str | Messages) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or not str(completion[-1].get("content") or "").strip()


def _start(tokenizer: Any) -> list[int]:
    return [] if getattr(tokenizer, "bos_token_id", None) is None else [tokenizer.bos_token_id]


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers close every text with their end token; a prompt goes on, and a text gets it once."""
    end = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and end is not None and ids[-1] == end else ids


def _chat(tokenizer: Any, prompt: Messages, completion: str | Messages, row: str) -> tuple[list[int], list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{row} is a conversation but the tokenizer has no chat template; use an "
            "instruction-tuned model's tokenizer, set tokenizer.chat_template, or give plain text"
        )
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    before = _template(tokenizer, list(prompt), add_generation_prompt=True)
    whole = _template(tokenizer, [*prompt, *answer], add_generation_prompt=False)
    if whole[: len(before)] != before:
        # templates that treat the last turn differently (reasoning, trimmed spaces): the common part is the prompt
        raise InputError(
            f"{row}: the chat template writes the prompt differently once the answer follows, so the answer's tokens "
            "cannot be told apart; give prompt and completion as plain text"
        )
    return before, whole[len(before) :]


def _template(tokenizer: Any, messages: list[Any], *, add_generation_prompt: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
    )["input_ids"]
    return list(ids[0]) if ids and isinstance(ids[0], (list, tuple)) else list(ids)
