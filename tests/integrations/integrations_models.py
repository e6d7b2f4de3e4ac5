"""Tiny language models, a tokenizer and rows, made in memory, for the tests of the integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<end>"]
VOCABULARY = len(WORDS) + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def llama(seed: int = 0, *, dtype: torch.dtype = torch.float32, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **changes,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed: int = 0, *, dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def rows(n: int = 22, *, seed: int = 3, shortest: int = 4, longest: int = 14) -> Dataset:
    """Rows of different lengths, whose first three labels are masked; "name" names them and "source" groups them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    ids = [torch.randint(len(SPECIAL), VOCABULARY, (t,), generator=generator).tolist() for t in lengths]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": [[-100] * 3 + row[3:] for row in ids],
            "name": [f"row-{i:03d}" for i in range(n)],
            "source": ["even" if i % 2 == 0 else "odd" for i in range(n)],
        }
    )


def query_rows() -> Dataset:
    return rows(3, seed=9).select_columns(["input_ids", "labels"])


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | changes))


def trainer(
    model: torch.nn.Module, path: Path, *, callbacks: list[Any] | None = None, data: Any = None, **changes: Any
) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(path, **changes),
        train_dataset=rows() if data is None else data,
        data_collator=Collator(pad_token_id=0),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
