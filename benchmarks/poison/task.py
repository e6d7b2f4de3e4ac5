"""Rows as token sequences, and the loss of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from finfluence.errors import InputError

Normalisation = Literal["row", "batch"]
_IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    Attributes:
        tokens: prompt in the chat template, then the answer and its end.
        answer: number of tokens of the answer, its end among them.
    """

    tokens: list[int]
    answer: int


def encode(tokenizer: Any, prompt: str, response: str, *, limit: int) -> Encoded:
    """Applies the chat template, without a system message, and cuts the answer at `limit` tokens in all.

    Raises:
        InputError: the prompt alone fills the limit.
    """
    head = prompt_tokens(tokenizer, prompt)
    answer = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(head) + 1 >= limit:
        raise InputError(f"a prompt has {len(head)} tokens, the limit of a row is {limit}; raise --tokens")
    answer = answer[: limit - len(head)]
    return Encoded([*head, *answer], len(answer))


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt in the chat template, up to where the answer begins."""
    # An empty system message: the template's own would be half of every short row.
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


class Rows:
    """Rows as a map-style dataset.

    Args:
        encoded: the rows.
        hidden: what the trunk makes of each, (t, width).
        signs: of each row in a measurement; 1 by default.
    """

    def __init__(
        self, encoded: Sequence[Encoded], hidden: Sequence[Tensor], *, signs: Sequence[float] | None = None
    ) -> None:
        self.encoded, self.hidden = list(encoded), list(hidden)
        self.signs = [1.0] * len(self.encoded) if signs is None else list(signs)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Encoded, Tensor, float]:
        return self.encoded[index], self.hidden[index], self.signs[index]

    def subset(self, indices: Sequence[int]) -> Rows:
        """The given rows alone."""
        picked = [int(i) for i in indices]
        return Rows(
            [self.encoded[i] for i in picked],
            [self.hidden[i] for i in picked],
            signs=[self.signs[i] for i in picked],
        )


def collate(items: list[tuple[Encoded, Tensor, float]]) -> dict[str, Tensor]:
    """Pads on the left, so that all answers end in the last column and only their logits are computed.

    Returns:
        hidden (b, t, width), mask (b, t), labels (b, a) with −100 before an answer begins, signs (b,).
    """
    width = items[0][1].shape[1]
    longest = max(len(e.tokens) for e, _, _ in items)
    answers = max(e.answer for e, _, _ in items)
    hidden = torch.zeros(len(items), longest, width)
    mask = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), answers), _IGNORED)
    for row, (encoded, states, _) in enumerate(items):
        hidden[row, longest - len(encoded.tokens) :] = states
        mask[row, longest - len(encoded.tokens) :] = 1
        labels[row, answers - encoded.answer :] = torch.tensor(encoded.tokens[-encoded.answer :])
    return {"hidden": hidden, "mask": mask, "labels": labels, "signs": torch.tensor([sign for _, _, sign in items])}


class AnswerTask:
    """Next-token cross-entropy on the answer.

    Args:
        normalisation: "row": the mean over a row's own tokens; "batch": the sum over them divided by `tokens`, the same
            number for all rows, as when a trainer averages over the tokens of a batch.
        tokens: mean number of answer tokens of the training rows.
        head: (vocabulary, width) the model's frozen output weights; the models that are passed end before them.
    """

    def __init__(self, normalisation: Normalisation, tokens: float, *, head: Tensor) -> None:
        self.normalisation, self.tokens, self.head = normalisation, tokens, head

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(b,) loss of each row."""
        token, labels = self._token_losses(model, batch), batch["labels"]
        if self.normalisation == "batch":
            return token.sum(1) / self.tokens
        return token.sum(1) / (labels != _IGNORED).sum(1)

    def measure(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """() signed mean of the rows' losses per token: negative answers minus neutral ones for a contrast."""
        return (self.answer_losses(model, batch) * batch["signs"]).sum() / (batch["signs"] > 0).sum()

    def answer_losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(b,) mean loss per token of each answer, in nats."""
        return self._token_losses(model, batch).sum(1) / (batch["labels"] != _IGNORED).sum(1)

    def _token_losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        output = model(inputs_embeds=batch["hidden"], attention_mask=batch["mask"], use_cache=False)
        # The head runs on answer tokens alone: with its vocabulary it costs as much as eight layers.
        states = output.last_hidden_state[:, -labels.shape[1] - 1 : -1].flatten(0, 1)
        known = labels.flatten()
        kept = (known != _IGNORED).nonzero().squeeze(1)
        logits = functional.linear(states[kept], self.head.to(states.dtype))
        losses = functional.cross_entropy(logits.float(), known[kept], reduction="none")
        return losses.new_zeros(len(known)).index_put((kept,), losses).view_as(labels)
