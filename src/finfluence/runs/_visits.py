"""Which epoch and position a batch belongs to, told from the ids alone."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.signals import IdDtype


class EpochCounter:
    """Follows a loop's batches through its epochs.

    Under shuffling, an epoch ends when a sample comes round again. Under the other samplers epochs cannot be told from
    ids and are what the caller says.

    Args:
        with_replacement: whether a sample may come twice in an epoch.
        known: ids of the sample table; None where it is made of the ids that come.
    """

    def __init__(self, *, with_replacement: bool, known: Collection[int | str] | None = None) -> None:
        self.with_replacement = with_replacement
        self._known = known
        self.epoch = 0
        self._position = -1
        self._seen_now: set[int | str] = set()
        self._seen: dict[int | str, None] = {}

    @property
    def count(self) -> int:
        """Distinct samples seen so far."""
        return len(self._seen)

    def go_on(self, steps: pl.LazyFrame, visits: pl.LazyFrame) -> None:
        """Goes on where a recorded run stands.

        Args:
            steps: step, epoch, position.
            visits: step, sample; one row a visit.
        """
        places = steps.select("step", "epoch", "position").sort("step").collect()
        if not places.height:
            return
        seen = visits.select("step", "sample").collect()
        self._seen = dict.fromkeys(seen["sample"].to_list())
        self.epoch, self._position = int(places["epoch"][-1] or 0), int(places["position"][-1] or 0)
        now = places.filter(pl.col("epoch") == self.epoch)["step"].implode()
        self._seen_now = set(seen.filter(pl.col("step").is_in(now))["sample"].to_list())

    def begin_batch(
        self, ids: np.ndarray, *, step: int, epoch: int | None = None, position: int | None = None
    ) -> tuple[int, int]:
        """(epoch, position) of a step whose first micro-batch has these ids.

        Args:
            ids: (b,) ids.
            step: index of the step, for messages.
            epoch: index of the epoch where the caller knows it.
            position: index of the batch in the epoch where the caller knows it.

        Raises:
            InputError: an id stands twice in the batch although the sampler shuffles, or is not in the sample table.
        """
        repeated = not self.with_replacement and not self._seen_now.isdisjoint(ids.tolist())
        if (epoch is not None and epoch != self.epoch) or (epoch is None and repeated):
            self.epoch = self.epoch + 1 if epoch is None else epoch
            self._position = -1
            self._seen_now = set()
        self._position = self._position + 1 if position is None else position
        self.visit(ids, step=step)
        return self.epoch, self._position

    def visit(self, ids: np.ndarray, *, step: int) -> None:
        """Notes that a step's (further) micro-batch holds these ids."""
        names = ids.tolist()
        if not self.with_replacement and len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(
                f"sample id {twice!r} stands twice in the batch of step {step}; pass ids (not labels), or "
                'sampler=Sampler("with-replacement") if the loop draws with replacement'
            )
        if self._known is not None:
            for name in names:
                if name not in self._known:
                    raise InputError(
                        f"sample id {name!r} in the batch of step {step} is not in the sample table "
                        f"({len(self._known)} ids); pass the samples' ids, not positions in the batch"
                    )
        self._seen_now.update(names)
        self._seen.update(dict.fromkeys(names))

    def frame(self, id_dtype: IdDtype) -> pl.DataFrame:
        """The sample table of the ids seen so far."""
        dtype = pl.Int64 if id_dtype == "int64" else pl.String
        ids = sorted(self._seen) if id_dtype == "int64" else list(self._seen)
        return pl.DataFrame({"sample": ids}, schema={"sample": dtype})
