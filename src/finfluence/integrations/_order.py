"""Which rows make up which batch, learnt from the loader's own batch sampler while it is iterated.

Ids do not travel with the data: collators drop columns they do not know. The order in which a loader asks for rows is
the order in which its batches arrive (workers and prefetching keep it), so it is enough to write down what the batch
sampler yields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from finfluence.errors import InputError, RecordingError
from finfluence.runs import Sampler


class _Observed:
    """Stands in for a batch sampler; yields what it yields, and passes every other request on."""

    def __init__(self, inner: Any, order: BatchOrder) -> None:
        self.__dict__.update(_inner=inner, _order=order)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # loaders ask isinstance(sampler, BatchSampler)
        return type(self._inner)

    def __iter__(self) -> Iterator[Any]:
        return self._order.observe(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)


class BatchOrder:
    """Follows the batches of one loader, from `attach` to `detach`.

    Args:
        loader: a torch DataLoader, or Accelerate's around one.
        abandoned: called when an epoch's iteration is given up without an end (an exception in the training loop).

    Raises:
        InputError: an iterable dataset, a loader without batch sampler or one that hands batches over out of order.
    """

    def __init__(self, loader: Any, *, abandoned: Callable[[], None]) -> None:
        base = getattr(loader, "base_dataloader", loader)
        self.dataset: Any = getattr(base, "dataset", None)
        sampler = getattr(base, "batch_sampler", None)
        if _is_iterable(self.dataset):
            raise InputError(
                f"the training data is an iterable dataset ({type(self.dataset).__name__}), whose rows have no index "
                "and no fixed number; use a map-style dataset (datasets.Dataset, or one with __len__ and __getitem__)"
            )
        if sampler is None or hasattr(base, "state_dict"):
            raise InputError(
                f"the training loader {type(base).__name__} has no batch sampler to follow; use a DataLoader with a "
                "batch_size or a batch_sampler"
            )
        if getattr(base, "num_workers", 0) and not getattr(base, "in_order", True):
            raise InputError("the training loader hands batches over out of order; set dataloader_in_order=True")
        self._base, self._sampler, self._abandoned = base, sampler, abandoned
        self._waiting: deque[np.ndarray] = deque()

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """The loader's collator."""
        return self._base.collate_fn

    @property
    def drop_last(self) -> bool:
        """Whether the loader drops an epoch's last, smaller batch."""
        return bool(getattr(self._sampler, "drop_last", False))

    @property
    def row_sampler(self) -> Any:
        """The sampler of single rows where there is one, else the batch sampler."""
        return getattr(self._sampler, "sampler", self._sampler)

    @property
    def sampler(self) -> Sampler:
        """How the loader draws its batches, which decides the noise formula."""
        replacement = bool(getattr(self.row_sampler, "replacement", False))
        return Sampler("with-replacement" if replacement else "shuffled", drop_last=self.drop_last)

    def attach(self) -> None:
        """Begin to follow; the loader is as before but for this one attribute, which `detach` puts back."""
        object.__setattr__(self._base, "batch_sampler", _Observed(self._sampler, self))

    def detach(self) -> None:
        """Put the loader's own batch sampler back."""
        object.__setattr__(self._base, "batch_sampler", self._sampler)
        self._waiting.clear()

    def observe(self, sampler: Any) -> Iterator[Any]:
        """The sampler's batches, written down as they are asked for."""
        self._waiting.clear()
        try:
            for batch in sampler:
                self._waiting.append(np.asarray(batch, dtype=np.int64).reshape(-1))
                yield batch
        except GeneratorExit:
            self._abandoned()
            raise

    def skip(self, batches: int) -> None:
        """Forget the next batches: the loader read past them."""
        for _ in range(batches):
            self.next()

    def peek(self) -> np.ndarray:
        """(b,) rows of the next batch to arrive.

        Raises:
            RecordingError: the loader was not asked for one.
        """
        if not self._waiting:
            raise RecordingError(
                "a batch arrived that the training loader's sampler did not ask for; the trainer reads its data from "
                "somewhere else than the loader it was given"
            )
        return self._waiting[0]

    def next(self) -> np.ndarray:
        """(b,) rows of the next batch, which is now taken."""
        rows = self.peek()
        self._waiting.popleft()
        return rows


def _is_iterable(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return True
    return not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
