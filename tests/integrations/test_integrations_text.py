"""Text becomes tokens with the prompt masked, through the chat template; bad rows are named in one line."""

from typing import Any

import pytest
import torch
from integrations_models import SPECIAL, tokenizer

from finfluence.errors import InputError
from finfluence.integrations.text import pad_batch, pad_token_id, tokenize_completion, tokenize_text

USER, ASSISTANT, END = (SPECIAL.index(f"<{name}>") for name in ("user", "assistant", "end"))
EOS = SPECIAL.index("</s>")
PROMPT = [{"role": "user", "content": "w1 w2"}]


def word(i: int) -> int:
    return len(SPECIAL) + i


def test_a_text_prompt_is_masked_and_the_completion_ends() -> None:
    row = tokenize_completion(tokenizer(), "w1 w2", "w3 w4")
    assert row["input_ids"] == [word(1), word(2), word(3), word(4), EOS]
    assert row["labels"] == [-100, -100, word(3), word(4), EOS]
    assert tokenize_completion(tokenizer(), "w1", "w3", eos=False)["labels"] == [-100, word(3)]
    assert tokenize_completion(tokenizer(), "", "w3")["labels"] == [-100, word(3), EOS]  # behind the first token


def test_messages_go_through_the_chat_template() -> None:
    row = tokenize_completion(tokenizer(), PROMPT, "w3")
    assert row["input_ids"] == [USER, word(1), word(2), END, ASSISTANT, word(3), END]
    assert row["labels"] == [-100] * 5 + [word(3), END]
    assert row == tokenize_completion(tokenizer(), PROMPT, [{"role": "assistant", "content": "w3"}])


def test_plain_text_is_all_labels() -> None:
    row = tokenize_text(tokenizer(), "w1 w2")
    assert row["input_ids"] == row["labels"] == [word(1), word(2), EOS]


@pytest.mark.parametrize(
    ("prompt", "completion", "changes", "message"),
    [
        ("w1", " ", {}, "empty completion"),
        (PROMPT, [{"role": "assistant", "content": ""}], {}, "empty completion"),
        ("w1", [{"role": "assistant", "content": "w2"}], {}, "both as messages"),
        ("w1 w2 w3", "w4", {"max_length": 4}, "5 tokens, more than the context of 4"),
    ],
)
def test_bad_rows_are_named(prompt: Any, completion: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tokenize_completion(tokenizer(), prompt, completion, row="row 7", **changes)
    assert "row 7" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_conversation_needs_a_chat_template() -> None:
    with pytest.raises(InputError, match="no chat template"):
        tokenize_completion(tokenizer(chat=False), PROMPT, "w3")


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    changed = tokenizer()
    changed.chat_template = "{{ messages|length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    changed.add_tokens(["1", "2"])
    with pytest.raises(InputError, match="cannot be told apart"):
        tokenize_completion(changed, PROMPT, "w3")


def test_a_batch_is_padded_on_either_side() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": torch.tensor([8])}]
    right = pad_batch(rows, pad_token_id(tokenizer()))
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad_batch(rows, 0, side="left")["input_ids"].tolist()[1] == [0, 0, 8]
    for bad, message in (([], "0 rows"), ([{"input_ids": [1, 2], "labels": [1]}], "one label a token")):
        with pytest.raises(InputError, match=message):
            pad_batch(bad, 0)
