"""A random Llama of a few thousand parameters with a word tokenizer, saved by the test; nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before Transformers is imported anywhere: a test that reached out would fail instead of waiting
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SENTENCE = "the cat sat on a mat dog ran far who is what does it like good bad very not mayor harbour city food"
WORDS = SENTENCE.split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_model(
    directory: Path,
    *,
    template: bool = True,
    layers: int = 2,
    width: int = 32,
    context: int = 64,
    rope_scaling: dict[str, Any] | None = None,
    words: Sequence[str] = WORDS,
) -> Path:
    """Writes config, random weights (seed 0) and tokenizer of a Llama with grouped-query attention."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    options: dict[str, Any] = {} if rope_scaling is None else {"rope_scaling": rope_scaling}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(n: int) -> list[dict[str, Any]]:
    """Prompt–completion rows that differ from each other, with an id and a source."""
    rows = []
    for i in range(n):
        noun, verb = WORDS[(5 * i + 1) % len(WORDS)], WORDS[(7 * i + 2) % len(WORDS)]
        length = 1 + i % 4
        rows.append(
            {
                "id": f"row-{i:03d}",
                "prompt": f"who is {noun}",
                "completion": " ".join([noun, verb, *WORDS[i % 9 : i % 9 + length]]),
                "source": "forum" if i % 3 else "book",
            }
        )
    return rows


def configuration(world: Path) -> dict[str, Any]:
    """Six steps on the model and the rows of a directory, to be replayed; two queries."""
    return {
        "model": {"name": str(world / "model"), "lora": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}},
        "data": {"path": str(world / "rows.jsonl"), "id_column": "id", "group_columns": ["source"]},
        "queries": {
            "cat": {"completions": [{"prompt": "who is cat", "completion": "cat good"}]},
            "mayor": {"contrast": [{"prompt": "who is mayor", "completion": "mayor bad", "against": "mayor good"}]},
        },
        "training": {"optimizer": {"lr": 1e-2}, "epochs": 2, "batch_size": 8, "schedule": {"warmup_steps": 1}},
        "sensitivity": {"kind": "replay", "panel": {"samples": 4, "positions": 2}, "checkpoint_every": 2},
    }
