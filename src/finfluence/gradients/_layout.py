"""Where the samples of a batch lie in a tensor.

A layout is the dimension whose index is the sample, or, for a batch folded into the rows of dimension 0,
"batch-major" (row = sample · t + time) or "time-major" (row = time · b + sample), or `Segments`: samples of different
lengths one behind the other along one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Samples one behind the other along a dimension (padding-free batches of tokens).

    Args:
        lengths: (b,) entries of each sample; what follows the last belongs to no sample (padding at the end).
        dim: the dimension.
    """

    lengths: tuple[int, ...]
    dim: int = 1

    def within(self, shape: Sequence[int], total: int) -> Segments | None:
        """Where the samples lie in a tensor of a batch of `total` entries: (1, total, …) or (total, …), else None.

        (1, total − 1, …) is a next-token result, whose entries belong to the token that they were made from.
        """
        if len(shape) >= 2 and shape[0] == 1 and shape[1] in (total, total - 1):
            return Segments(self.lengths, 1)
        return Segments(self.lengths, 0) if len(shape) >= 1 and shape[0] == total else None

    def sum(self, tensor: Tensor, *, keep: int) -> Tensor:
        """(b, *last `keep` dimensions): the sum over each sample's entries."""
        tensor = tensor.movedim(self.dim, 0)
        kept = tensor.shape[tensor.ndim - keep :] if keep else ()
        rows = tensor.reshape(len(tensor), -1, *kept).sum(1)
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return torch.stack([rows[end - n : end].sum(0) for n, end in zip(self.lengths, ends, strict=True)])


Layout = int | Literal["batch-major", "time-major"] | Segments


def candidates(shape: Sequence[int], batch_size: int, *, feature_dims: int, batch_dim: int | None) -> list[Layout]:
    """The layouts that a shape admits, the most likely first.

    Args:
        shape: of the tensor.
        batch_size: samples in the batch, b.
        feature_dims: trailing dimensions that cannot be the batch (1 for Linear's output).
        batch_dim: the caller's own statement; None to infer dimension 0, else 1, else folded rows.

    Returns:
        Possibly empty list; folded layouts appear only where no dimension has size b, and need evidence.
    """
    leading = len(shape) - feature_dims
    if batch_dim is not None:
        return [batch_dim] if batch_dim < leading and shape[batch_dim] == batch_size else []
    plain: list[Layout] = [d for d in (0, 1) if d < leading and shape[d] == batch_size]
    if plain:
        return plain
    if leading >= 1 and shape[0] > batch_size and shape[0] % batch_size == 0:
        return ["batch-major", "time-major"]
    return []


def admits(shape: Sequence[int], batch_size: int, layout: Layout) -> bool:
    """Whether a tensor of this shape can have the layout."""
    if isinstance(layout, int):
        return layout < len(shape) and shape[layout] == batch_size
    if isinstance(layout, Segments):
        return layout.dim < len(shape) and shape[layout.dim] >= sum(layout.lengths)
    return len(shape) >= 1 and shape[0] % batch_size == 0


def coincides(shape: Sequence[int], batch_size: int) -> bool:
    """Whether two dimensions have the batch's size, so that sizes alone do not tell which one it is."""
    return batch_size > 1 and sum(size == batch_size for size in shape) >= 2


def unfolded(tensor: Tensor, batch_size: int, layout: Layout) -> tuple[Tensor, int]:
    """The tensor with its batch as a dimension of its own, and that dimension."""
    if layout == "batch-major":
        return tensor.unflatten(0, (batch_size, -1)), 0
    if layout == "time-major":
        return tensor.unflatten(0, (-1, batch_size)), 1
    assert isinstance(layout, int)
    return tensor, layout


def sum_to_samples(
    tensor: Tensor, batch_size: int, layout: Layout, *, keep: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over everything but the samples and the last `keep` dimensions.

    Args:
        tensor: with the batch where `layout` says.
        batch_size: samples in the batch, b; with b = 1 every element belongs to the one sample, whatever the layout.
        layout: where the samples lie.
        keep: trailing dimensions that stay.
        dtype: to accumulate in; None keeps the tensor's.

    Returns:
        (b, *last `keep` dimensions).
    """
    if isinstance(layout, Segments):
        return layout.sum(tensor if dtype is None else tensor.to(dtype), keep=keep)
    if batch_size == 1:
        kept = tensor.shape[tensor.ndim - keep :]
        return tensor.reshape(1, -1, *kept).sum(1, dtype=dtype)
    tensor, batch = unfolded(tensor, batch_size, layout)
    others = [d for d in range(tensor.ndim - keep) if d != batch]
    if not others:
        return tensor if dtype is None else tensor.to(dtype)
    return tensor.sum(dim=others, dtype=dtype)


def confined(tensor: Tensor, batch_size: int, layout: Layout, *, sample: int) -> bool:
    """Whether a tensor is zero for every sample but one.

    Args:
        tensor: gradient of something that depends on one sample only, at some layer's output.
        batch_size: samples in the batch.
        layout: to test.
        sample: the one.
    """
    mass = sum_to_samples(tensor.abs(), batch_size, layout, dtype=torch.float64)
    mass[sample] = 0
    return not bool(mass.any())
