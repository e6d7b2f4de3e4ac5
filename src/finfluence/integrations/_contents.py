"""Whether a batch holds the rows that its loader's sampler asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from finfluence.errors import RecordingError
from finfluence.integrations import _rows

_CHECKED_BATCHES = 4  # whose content is compared with the dataset, and then every _CHECK_EVERY-th
_CHECK_EVERY = 50


class Contents:
    """Compares the tokens of some batches with those of the dataset's rows.

    Args:
        dataset: of the trainer.
        check: "content" compares, "count" does not.
    """

    def __init__(self, dataset: Any, check: str) -> None:
        self._dataset, self._check, self._checked = dataset, check, 0

    def check_batch(self, tokens: Any, rows: np.ndarray, *, step: int) -> None:
        """Compares a batch that has a row each, if its turn has come.

        Args:
            tokens: (b, t), or something that is not compared.
            rows: (b,) rows of the dataset.
            step: for messages.

        Raises:
            RecordingError: they differ.
        """
        self._checked += 1
        seldom = self._checked > _CHECKED_BATCHES and self._checked % _CHECK_EVERY
        if self._check != "content" or seldom or not isinstance(tokens, Tensor) or tokens.ndim != 2:
            return
        mine = [_rows.tokens_of(self._dataset, int(row)) for row in rows]
        if all(m is not None for m in mine):
            _rows.check_tokens(tokens, rows.tolist(), [m for m in mine if m is not None], step=step)

    def segments(self, tensor: Tensor, rows: np.ndarray, *, step: int) -> tuple[list[int], int]:
        """Lengths of the rows that a padding-free collator wrote one behind the other, and that of the whole.

        Args:
            tensor: (1, t, …) the batch.
            rows: (b,) rows of the dataset.
            step: for messages.

        Raises:
            RecordingError: the rows do not make up the batch.
        """
        tokens = [_rows.tokens_of(self._dataset, int(row)) for row in rows]
        lengths = [len(t) for t in tokens if t is not None]
        if len(lengths) < len(rows) or sum(lengths) > tensor.shape[1]:
            raise RecordingError(
                f"the batch at step {step} is one row of {tensor.shape[1]} entries for {len(rows)} rows of the "
                "training set, whose lengths do not add up to it; use a collator that keeps one row each "
                "(padding_free=False)"
            )
        if self._check == "content" and tensor.ndim == 2 and not tensor.is_floating_point():
            parts = tensor[0, : sum(lengths)].split(lengths)
            for i, (part, mine) in enumerate(zip(parts, tokens, strict=True)):
                _rows.check_tokens(part[None], [int(rows[i])], [mine or []], step=step)
        return lengths, tensor.shape[1]
