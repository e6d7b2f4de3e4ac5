"""The architectures that every way of taking per-sample derivatives is checked on, and the naive loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from finfluence.gradients import Direction

B = 5  # differs from every other size below unless a case says otherwise


@dataclass
class Case:
    """A model and its losses.

    Args:
        make: () → model.
        losses: (model, rows) → losses of the batch's samples number `rows`, each alone or together.
        fd: relative tolerance of finite differences in float64.
        batch_size: b.
    """

    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Tensor], Tensor]
    fd: float = 1e-5
    batch_size: int = B


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like(model: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(model.parameters()).dtype)


def squares(output: Tensor, batch_dim: int = 0) -> Tensor:
    """A loss a sample that weighs every element differently."""
    flat = output.movedim(batch_dim, 0).flatten(1)
    weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return ((flat - 0.3) ** 2 * weights).sum(1)


def plain(make: Callable[[], nn.Module], *shape: int, batch_dim: int = 0, fd: float = 1e-5, b: int = B) -> Case:
    """A model of one tensor, with the batch at `batch_dim` of input and output."""
    x = data(*shape)

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        out = model(like(model, x).index_select(batch_dim, rows))
        return squares(out[0] if isinstance(out, tuple) else out, batch_dim)

    return Case(make, losses, fd, b)


def tokens(make: Callable[[], nn.Module], *, t: int, vocabulary: int = 11, b: int = B, fd: float = 1e-5) -> Case:
    """A language model on padded sequences."""
    ids = torch.randint(1, vocabulary, (b, t), generator=torch.Generator().manual_seed(2))
    ids[0, t - 2 :] = 0
    ids[-1, t // 2 :] = 0

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        x = ids[rows]
        logits = model(x)
        target = x.roll(-1, dims=1)
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        return (nll * (target != 0)).sum(1) / (target != 0).sum(1)

    return Case(make, losses, fd, b)


class Slot(nn.Module):
    """Bare parameters around a child, and a child used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.lin = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(torch.tanh(self.lin(x + self.shift)))) * self.gain


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(7, 9).requires_grad_(False)
        self.down = nn.Linear(7, 2, bias=False)
        self.up = nn.Linear(2, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + 2.0 * self.up(self.down(x)))


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.head = nn.ModuleDict({"a": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = torch.tanh(x @ w)
        return self.head["a"](x)


class Sub(nn.Linear):
    """A subclass whose forward is not Linear's."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(super().forward(input)) @ self.weight


class FunctionalTie(nn.Module):
    """The inner module's weight is also used by the outer one, past any call of the inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.inner[0].weight)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = FunctionalTie(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


class Folded(nn.Module):
    """(b, t, d) folded into rows before a layer, batch-major or time-major."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.lin, self.norm = order, nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        rows = x.reshape(b * t, -1) if self.order == "batch" else x.transpose(0, 1).reshape(b * t, -1)
        out = self.norm(torch.tanh(self.lin(rows)))
        return out.view(b, t, -1) if self.order == "batch" else out.view(t, b, -1).transpose(0, 1)


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool, dropout: float = 0.0, weights: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=dropout)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return h + self.mha(h, h, h, need_weights=self.weights)[0]


class Block(nn.Module):
    def __init__(self, d: int, dropout: float) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(2 * d, d))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.n2(x))


class Transformer(nn.Module):
    """Tied embedding and head, position embedding broadcast over the batch, padding mask, checkpointing."""

    def __init__(
        self, *, d: int = 8, length: int = 7, vocabulary: int = 11, dropout: float = 0.0,
        checkpointing: str = "none", positions: str = "flat", functional_head: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, d, padding_idx=0), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(d)
        self.functional_head = functional_head
        if not functional_head:
            self.head = nn.Linear(d, vocabulary, bias=False)
            self.head.weight = self.tok.weight
        self.checkpointing, self.positions = checkpointing, positions

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        x = self.tok(ids) + self.pos(steps if self.positions == "flat" else steps.unsqueeze(0))
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (ids != 0)[:, None, None, :]
        mask = mask | torch.eye(ids.shape[1], dtype=torch.bool)
        for block in self.blocks:
            if self.checkpointing == "none":
                x = block(x, mask)
            else:
                x = checkpoint(block, x, mask, use_reentrant=self.checkpointing == "reentrant")
        x = self.norm(x)
        return F.linear(x, self.tok.weight) if self.functional_head else self.head(x)


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def conv(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(4, 6, 3, **options), nn.Tanh(), kind(6, 2, 2, bias=False))


def norms(d: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, d), nn.LayerNorm(d), nn.Tanh(), nn.Linear(d, d), nn.RMSNorm(d), nn.Linear(d, 2))


def groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.GroupNorm(2, 16))


def relu_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )


def frozen_mlp() -> nn.Module:
    model = relu_mlp()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def shared_mlp() -> nn.Module:
    lin = nn.Linear(4, 4)
    return nn.Sequential(lin, nn.Tanh(), lin, nn.Tanh(), nn.Linear(4, 2))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w) + w.mT


def symmetric() -> nn.Module:
    lin = nn.Linear(4, 4)
    parametrize.register_parametrization(lin, "weight", Symmetric())
    return nn.Sequential(lin, nn.Tanh(), nn.Linear(4, 2))


def eval_batchnorm() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.Tanh())
    model[1].eval()
    return model


CASES: dict[str, Case] = {
    "linear": plain(relu_mlp, B, 4),
    "linear (b,t,d) with in-place relu": plain(relu_mlp, B, 6, 4),
    "linear (b,s,t,d)": plain(relu_mlp, B, 2, 3, 4),
    "linear where width equals batch": plain(lambda: nn.Sequential(nn.Linear(B, B), nn.Tanh(), nn.Linear(B, B)), B, B),
    "batch of one": plain(relu_mlp, 1, 6, 4, b=1),
    "frozen": plain(frozen_mlp, B, 4),
    "shared module": plain(shared_mlp, B, 4),
    "bare parameters": plain(Slot, B, 6),
    "bare parameters (b,t,d)": plain(Slot, B, 3, 6),
    "lora": plain(LoRA, B, 3, 7),
    "parameter list": plain(Containers, B, 4),
    "subclass": plain(lambda: Sub(4, 6), B, 4),
    "weight norm": plain(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh()), B, 4),
    "parametrized": plain(symmetric, B, 4),
    "functional tie": plain(Nested, B, 4),
    "folded batch-major": plain(lambda: Folded("batch"), B, 3, 3),
    "folded time-major": plain(lambda: Folded("time"), B, 3, 3),
    "conv1d": plain(conv(nn.Conv1d, stride=2, padding=1), B, 4, 9),
    "conv1d circular": plain(conv(nn.Conv1d, padding=2, padding_mode="circular"), B, 4, 9),
    "conv2d": plain(conv(nn.Conv2d, dilation=2, padding="same"), B, 4, 6, 7),
    "conv2d groups": plain(conv(nn.Conv2d, groups=2, stride=(1, 2)), B, 4, 6, 7),
    "conv2d reflect": plain(conv(nn.Conv2d, padding=1, padding_mode="reflect"), B, 4, 6, 7),
    "conv3d": plain(conv(nn.Conv3d), B, 4, 4, 4, 6),
    "conv transpose": plain(lambda: nn.ConvTranspose2d(3, 4, 2), B, 3, 4, 4),
    "batchnorm in eval mode": plain(eval_batchnorm, B, 2, 6),
    "norms": plain(lambda: norms(6), B, 3),
    "norms (b,t,d)": plain(lambda: norms(6), B, 4, 3),
    "groupnorm": plain(groups, B, 3, 3, 3),
    "attention": plain(lambda: Attention(batch_first=True), B, 3, 4),
    "attention with weights": plain(lambda: Attention(batch_first=True, weights=True), B, 3, 4),
    "attention, sequence first": plain(lambda: Attention(batch_first=False), 3, B, 4, batch_dim=1),
    "encoder layer, sequence first": plain(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 3, B, 4, batch_dim=1
    ),
    "encoder layer": plain(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), B, 3, 4),
    "lstm": plain(lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True), B, 6, 3),
    "gru, sequence first": plain(lambda: nn.GRU(3, 4, bidirectional=True), 6, B, 3, batch_dim=1),
    "transformer": tokens(Transformer, t=7),
    "transformer, positions (1,t)": tokens(lambda: Transformer(positions="row"), t=7),
    "transformer, t equals b": tokens(Transformer, t=7, b=7),
    "transformer, t equals b, positions (1,t)": tokens(lambda: Transformer(positions="row"), t=7, b=7),
    "transformer, t a multiple of b": tokens(lambda: Transformer(length=10), t=10),
    "transformer, functional head": tokens(lambda: Transformer(functional_head=True), t=7),
    "transformer, checkpointing": tokens(lambda: Transformer(checkpointing="non-reentrant"), t=7),
    "transformer, checkpointing, t equals b": tokens(lambda: Transformer(checkpointing="non-reentrant"), t=7, b=7),
}  # fmt: skip


def build(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The case's model, seeded and in training mode."""
    torch.manual_seed(0)
    model = case.make()
    return model.to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_directions(model: nn.Module, n: int, seed: int = 3) -> list[Direction]:
    """Dense random directions; the second lacks every other parameter, the third is scaled."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for k in range(n):
        tensors = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for name, p in trainable(model).items()
        }
        if k == 1 and len(tensors) > 1:
            tensors = dict(list(tensors.items())[::2])
        result.append(Direction(tensors).scaled(-0.1) if k == 2 else Direction(tensors))
    return result


def naive(case: Case, model: nn.Module, directions: list[Direction]) -> Tensor:
    """⟨q_k, ∇ℓ_i⟩ with the gradient of every sample's loss taken alone, (b, n_directions)."""
    parameters = trainable(model)
    rows = []
    for i in range(case.batch_size):
        loss = case.losses(model, torch.tensor([i])).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        named = dict(zip(parameters, gradients, strict=True))
        rows.append(torch.stack([d.dot(named) for d in directions]))
    return torch.stack(rows)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest error of a direction's column over its norm."""
    return float(((got.double() - expected).norm(dim=0) / expected.norm(dim=0)).max())
