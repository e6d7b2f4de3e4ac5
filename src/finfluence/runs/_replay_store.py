"""What a replay keeps in the run directory: signals and adjoints of finished segments, and how to go on from there.

A commit covers the steps from one stored state up to the last commit. Its parts are named after the step at which it
ends, so a commit that was interrupted is replaced by the next one, which ends at the same step.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from finfluence.errors import ReplayError, StoreError
from finfluence.runs._adjoints import clear_adjoints, write_adjoints
from finfluence.runs._segment import StepSignals
from finfluence.runs.states import StateStore
from finfluence.sensitivity import FlatUpdate, States
from finfluence.signals import Folder, SignalTable, SignalWriter

_STATES = "adjoint-states"
_TABLES: tuple[SignalTable, ...] = ("signals", "panel")
# A norm that moved by more says that the query's data or the model is another.
_SAME_NORM = 1e-3


class ReplayStore:
    """The files and the manifest entry of one replay.

    Args:
        folder: the run directory.
        writer: the run's open store.
        queries: names of the queries.
    """

    def __init__(self, folder: Folder, writer: SignalWriter, *, queries: Sequence[str]) -> None:
        self.folder, self.writer, self.queries = folder, writer, list(queries)
        self.states = StateStore(folder, _STATES)
        self._names: pl.Series | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What run.json says of the replay; empty before the first one."""
        return dict(self.writer.manifest.get("replay") or {})

    def update(self, **fields: Any) -> None:
        """Sets fields of the replay's entry."""
        self.writer.update_manifest(replay=self.entry | fields)

    def begin(self, options: Mapping[str, Any], norms: Sequence[float]) -> None:
        """Goes on with the replay that is there if it was the same, else starts anew.

        Args:
            options: what the signals depend on.
            norms: of each query's gradient at the end of the training.
        """
        known = self.entry
        same = known.get("options") == dict(options) and list(known.get("queries", ())) == self.queries
        if same and np.allclose(known["norms"], norms, rtol=_SAME_NORM, atol=0.0):
            return
        self.forget()
        fields = {"options": dict(options), "queries": self.queries, "norms": list(norms), "diverged": {}}
        self.writer.update_manifest(
            replay=fields | {"finished": False, "largest_mismatch": 0.0, "largest_residual": 0.0}
        )

    def forget(self) -> None:
        """Deletes what an earlier replay left. The adjoints go first: without them nothing is taken to be finished."""
        self.writer.update_manifest(replay={})
        for step in self.states.steps():
            self.states.remove(step)
        for table in _TABLES:
            self.writer.clear(table)
        clear_adjoints(self.folder)

    def committed(self) -> int | None:
        """The step down to which the replay is finished; None before its first commit."""
        steps = self.states.steps()
        return steps[0] if steps else None

    def load(self, step: int, update: FlatUpdate, *, like: Tensor) -> tuple[Tensor, States]:
        """The adjoint, (n_queries, size), and the state's adjoint before a step."""
        tensors = self.states.load(step)
        state = tuple(
            {k.split("/", 2)[2]: v.to(like) for k, v in tensors.items() if k.startswith(f"state/{g}/")}
            for g in range(len(update.groups))
        )
        return tensors["theta"].to(like), state

    def commit(
        self,
        first: int,
        last: int,
        *,
        found: Sequence[StepSignals],
        members: np.ndarray | None,
        adjoint: Tensor,
        state: States,
        fields: Mapping[str, Any],
    ) -> None:
        """Makes the steps first … last − 1 durable.

        Args:
            first: the step that the adjoint belongs to.
            last: the step of the commit before, or the end of the run.
            found: the steps' signals, in the order of steps.
            members: (m,) rows of the panel; None for no panel.
            adjoint: (n_queries, size) before step `first`.
            state: the same of the optimizer's state.
            fields: of the replay's manifest entry.
        """
        name = f"replay-{last:09d}"
        void = [self.queries.index(q) for q in fields.get("diverged", {})]
        rows = [(s, s.batch.indices, s.values) for s in found]
        self.writer.replace_part("signals", name, self._frame(rows, void, place=False))
        if members is not None:
            panel = [(s, members, s.panel) for s in found if s.panel is not None]
            # also where it is empty: it replaces what an interrupted, longer commit may have left
            self.writer.replace_part("panel", name, self._frame(panel, void, place=True))
        rows_by_step = [(s.batch.step, s.norms, s.residuals) for s in found]
        write_adjoints(self.folder, name, rows_by_step, queries=self.queries)
        if fields:
            self.update(**fields)
        tensors = {"theta": adjoint} | {f"state/{g}/{k}": v for g, own in enumerate(state) for k, v in own.items()}
        self.states.save(first, tensors)
        for step in self.states.steps():
            if step > first:
                self.states.remove(step)

    def finish(self) -> None:
        """Voids what was written of queries that diverged later on, and marks the replay as finished."""
        if diverged := self.entry["diverged"]:
            for table in _TABLES:
                for name in self.writer.parts(table):
                    frame = pl.read_parquet(io.BytesIO(self.folder.read(f"{table}/part-{name}.parquet")))
                    void = [pl.lit(None, pl.Float32).fill_null(float("nan")).alias(q) for q in diverged]
                    self.writer.replace_part(table, name, frame.with_columns(void))
        self.update(finished=True)
        for step in self.states.steps():
            self.states.remove(step)

    def _frame(
        self, rows: Sequence[tuple[StepSignals, np.ndarray, Any]], void: list[int], *, place: bool
    ) -> pl.DataFrame:
        counts = [len(indices) for _, indices, _ in rows]

        def repeated(values: list[int]) -> np.ndarray:
            return np.repeat(np.array(values, dtype=np.int64), counts)

        columns: dict[str, Any] = {"step": repeated([s.batch.step for s, _, _ in rows])}
        if place:
            columns["epoch"] = repeated([s.batch.epoch for s, _, _ in rows])
            columns["position"] = repeated([s.batch.position for s, _, _ in rows])
        indices = np.concatenate([np.empty(0, np.int64), *(own for _, own, _ in rows)])
        columns["sample"] = self._samples()[indices]
        empty = np.empty((0, len(self.queries)))
        values = np.concatenate([empty, *(own for _, _, own in rows)]).astype(np.float32)
        values[:, void] = np.nan
        broken = ~np.asarray(np.isfinite(values).all(axis=0))
        broken[void] = False
        if broken.any():
            raise ReplayError(
                f"a replayed signal of query {self.queries[int(broken.argmax())]!r} is not finite although its adjoint "
                "is; train in float32 or float64, or lower the learning rate"
            )
        return pl.DataFrame(columns | {query: values[:, k] for k, query in enumerate(self.queries)})

    def _samples(self) -> pl.Series:
        if self._names is None:
            try:
                self._names = pl.read_parquet(io.BytesIO(self.folder.read("samples.parquet")))["sample"]
            except (FileNotFoundError, pl.exceptions.PolarsError) as error:
                raise StoreError(
                    f"{self.folder.path('samples.parquet')} cannot be read ({error}); restore it from a copy"
                ) from error
        return self._names


def query_norms(adjoint: Tensor) -> list[float]:
    """Norm of each query's adjoint, (n_queries, size)."""
    return [float(v) for v in torch.linalg.vector_norm(adjoint, dim=-1)]
