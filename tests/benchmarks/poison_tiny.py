"""A language model of three tiny layers, two of them adapted, and rows of random tokens for it."""

import numpy as np
import pytest
import torch
from benchmarks.poison.model import AdaptedModel, Adapters
from benchmarks.poison.task import Encoded, Rows

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def tiny_model() -> AdaptedModel:
    return AdaptedModel.of(tiny_llama(), Adapters(layers=2, rank=2), seed=0)


def rows_of(adapted: AdaptedModel, *lengths: tuple[int, int], seed: int = 0) -> Rows:
    """Rows of so many tokens, the last ones the answer's."""
    rng = np.random.default_rng(seed)
    encoded = [Encoded(rng.integers(3, 60, size=n).tolist(), answer) for n, answer in lengths]
    return Rows(encoded, adapted.trunk([e.tokens for e in encoded]))
