"""A Llama-architecture decoder (RMSNorm, rotary embedding, SDPA, SwiGLU) with LoRA adapters, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoraLinear(nn.Module):
    """A frozen linear map with a trainable low-rank update, as in LoRA (Hu et al. 2021)."""

    def __init__(self, d_in: int, d_out: int, *, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False)
        self.base.weight.requires_grad_(False)
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)  # not zero, so that both factors have gradients from the first step
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (LoraLinear(width, width, rank=rank) for _ in range(4))
        self.gate, self.up = LoraLinear(width, inner, rank=rank), LoraLinear(width, inner, rank=rank)
        self.down = LoraLinear(inner, width, rank=rank)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm_attention(x)
        q, k, v = (f(h).view(b, t, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, d))
        h = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Six blocks by default; only the adapters are trainable.

    Called with input_ids (b, t), returns logits (b, t, vocabulary).
    """

    def __init__(
        self,
        *,
        layers: int = 6,
        width: int = 512,
        heads: int = 8,
        inner: int = 1376,
        vocabulary: int = 4096,
        rank: int = 8,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner, rank) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            adapter = (".down.weight" in name or ".up.weight" in name) and name.count(".") >= 4
            parameter.requires_grad_(adapter)
        self.rotary = width // heads // 2

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        t = input_ids.shape[1]
        rate = torch.exp(-math.log(10000.0) * torch.arange(self.rotary, device=input_ids.device) / self.rotary)
        angle = torch.arange(t, device=input_ids.device)[:, None] * rate
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))
