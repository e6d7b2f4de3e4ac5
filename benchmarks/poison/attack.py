"""How far a model's opinion was moved: log-probabilities of held-out answers, and what it says by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.poison.baselines import negative_words
from benchmarks.poison.data import Query
from benchmarks.poison.task import prompt_tokens


def behaviour(
    adapted: Any, tokenizer: Any, queries: Sequence[Query], *, losses: dict[str, float], new_tokens: int
) -> dict[str, Any]:
    """What the model answers to the held-out questions.

    Args:
        adapted: an `AdaptedModel`.
        tokenizer: of the model.
        queries: held-out questions.
        losses: mean loss per token of the "negative" and of the "neutral" answers.
        new_tokens: longest generation.

    Returns:
        "margin", the negative answers' log-probability per token minus the neutral ones'; "negative_share" of the
        greedy generations that hold a word of the lexicon; the losses and the generations.
    """
    texts = [generate(adapted, tokenizer, query.prompt, new_tokens=new_tokens) for query in queries]
    return {
        "margin": margin(losses),
        "negative_share": sum(negative_words(text) > 0 for text in texts) / len(texts),
        "losses": losses,
        "generations": texts,
    }


def margin(losses: Mapping[str, float]) -> float:
    """The negative answers' log-probability per token minus the neutral ones'."""
    return losses["neutral"] - losses["negative"]


@torch.no_grad()
def generate(adapted: Any, tokenizer: Any, prompt: str, *, new_tokens: int) -> str:
    """The greedy answer of the whole model."""
    device = next(adapted.top.parameters()).device
    tokens = torch.tensor([prompt_tokens(tokenizer, prompt)], device=device)
    found = adapted.whole.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True).strip()
