"""Watched subsets: the per-step observations of f-INE's own two-stage test (Panda et al., ICLR 2026, stage 1).

At every step, with the live sensitivity q_t of a query, the signal of the batch with the subset, O_t = x(B_t ∪ S), and
without it, O′_t = x(B_t ∖ S), where x(B) = ⟨q_t, mean of ∇ℓ_i over B⟩. With an auxiliary model, trained on D∖S with
batches of its own, its signal Ô_t is recorded too, to be subtracted from both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from finfluence.errors import InputError
from finfluence.gradients import Direction
from finfluence.runs.engine import Engine
from finfluence.runs.live_queries import LiveQueries, Measure
from finfluence.runs.panel import panel_signals
from finfluence.runs.sampling import Batch
from finfluence.runs.states import StateStore, restore_training_state, training_state
from finfluence.signals import Folder, SignalWriter

Auxiliary = Literal["none", "train"]
_AUXILIARY_STREAM = 0xA0


class _Auxiliary:
    """A second model that trains on the data without a subset, with batches of its own."""

    def __init__(self, engine: Engine, measures: Mapping[str, Any], members: np.ndarray, number: int) -> None:
        rest = np.setdiff1d(np.arange(engine.n), members)
        plan = engine.plan.with_seed(
            int(np.random.SeedSequence([engine.plan.seed, _AUXILIARY_STREAM, number]).generate_state(1)[0])
        )
        self.engine = Engine(
            engine.task,
            copy.deepcopy(engine.model),
            dataset=engine.dataset,
            plan=plan,
            subset=rest,
            collate=engine.collate,
            population=engine.n,
        )
        self.live = LiveQueries(
            self.engine.model, self.engine.optimizer, parameters=self.engine.parameters, measures=measures
        )
        self.taken = 0
        self.batches = self.engine.batches()

    def step(self) -> np.ndarray:
        """(n_queries,) signal of the auxiliary model's next batch; takes the step."""
        batch = next(self.batches)
        self.engine.set_learning_rate(batch.step)
        directions = self.live.directions(batch.step)
        self.engine.backward(batch)
        self.engine.clip()
        gradients = {name: p.grad for name, p in self.engine.parameters.items()}
        observed = np.array([float(direction.dot(gradients)) for direction in directions])
        self.engine.optimizer.step()
        self.taken += 1
        return observed

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it."""
        taken = {"taken": torch.tensor(self.taken)}
        return training_state(self.engine.model, self.engine.optimizer) | taken

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to a stored state."""
        rest = dict(tensors)
        self.taken = int(rest.pop("taken"))
        restore_training_state(self.engine.model, self.engine.optimizer, rest)
        self.batches = self.engine.batches(self.taken)


class WatchedSubsets:
    """Records the observations of every watched subset at every step.

    Args:
        subsets: (m,) dataset rows by subset name.
        engine: the training.
        measures: measurement of each query.
        auxiliary: whether to train a model without each subset beside it.
    """

    def __init__(
        self,
        subsets: Mapping[str, np.ndarray],
        *,
        engine: Engine,
        measures: Mapping[str, Measure],
        auxiliary: Auxiliary,
    ) -> None:
        self.subsets, self.engine = dict(subsets), engine
        self._auxiliary = {
            name: _Auxiliary(engine, measures, members, number)
            for number, (name, members) in enumerate(self.subsets.items())
            if auxiliary == "train"
        }
        self._members: dict[str, np.ndarray] = {}

    @classmethod
    def build(
        cls,
        watch: Mapping[str, Any] | None,
        names: np.ndarray,
        *,
        engine: Engine,
        measures: Mapping[str, Measure],
        auxiliary: Auxiliary,
    ) -> WatchedSubsets | None:
        """The recorder of the subsets given by ids, or None where there are none.

        Raises:
            InputError: an empty or whole-set subset, or an id that is not in the data.
        """
        if auxiliary not in get_args(Auxiliary):
            raise InputError(f"unknown auxiliary {auxiliary!r}; choose one of {', '.join(get_args(Auxiliary))}")
        if not watch:
            if auxiliary == "train":
                raise InputError('auxiliary="train" needs subsets to train without; give watch={"name": ids}')
            return None
        rows = {name: row for row, name in enumerate(names.tolist())}
        subsets: dict[str, np.ndarray] = {}
        for subset, ids in watch.items():
            members = np.asarray(ids).tolist()
            if unknown := [i for i in members if i not in rows]:
                raise InputError(f"watched subset {subset!r} names sample {unknown[0]!r}, which is not in the data")
            if not 0 < len(set(members)) < len(names):
                raise InputError(
                    f"watched subset {subset!r} has {len(members)} of {len(names)} samples; it needs some, not all"
                )
            rest = len(names) - len(set(members))
            if auxiliary == "train" and rest < engine.plan.batch_size:
                raise InputError(
                    f"without watched subset {subset!r} {rest} samples are left for its auxiliary model, fewer than "
                    f"batch_size ({engine.plan.batch_size}); watch a smaller subset"
                )
            subsets[subset] = np.array(sorted({rows[i] for i in members}), dtype=np.int64)
        return cls(subsets, engine=engine, measures=measures, auxiliary=auxiliary)

    def save(self, step: int, directory: Folder) -> None:
        """Stores the auxiliary models as they are before a step; call it before the run's own state is stored."""
        for number, auxiliary in enumerate(self._auxiliary.values()):
            StateStore(directory, f"auxiliary-{number}").save(step, auxiliary.state())

    def keep_only(self, step: int, directory: Folder) -> None:
        """Deletes the stored auxiliary models of other steps."""
        for number in range(len(self._auxiliary)):
            StateStore(directory, f"auxiliary-{number}").keep_only(step)

    def restore(self, step: int, directory: Folder) -> None:
        """Puts the auxiliary models back to where they were before a step."""
        for number, auxiliary in enumerate(self._auxiliary.values()):
            auxiliary.restore(StateStore(directory, f"auxiliary-{number}").load(step))

    def before_step(self, batch: Batch, directions: Sequence[Direction]) -> None:
        """Evaluates the subsets' samples at the parameters before the step."""
        with torch.random.fork_rng(devices=[self.engine.device] if self.engine.device.type == "cuda" else []):
            self._members = {
                name: panel_signals(self.engine, members, directions, step=batch.step)
                for name, members in self.subsets.items()
            }

    def after_step(self, batch: Batch, values: np.ndarray | None, writer: SignalWriter) -> None:
        """Stores the observations of a step.

        Args:
            batch: the step's batch.
            values: (b, n_queries) signals of the batch as recorded; None for an empty batch.
            writer: the run's store.
        """
        if values is None or not len(batch.indices):
            return
        weightless = values * batch.denominator
        for name, members in self.subsets.items():
            inside = np.isin(batch.indices, members)
            rest, rest_size = weightless[~inside].sum(0), int((~inside).sum())
            observed = {"with": (rest + self._members[name].sum(0)) / (rest_size + len(members))}
            observed["without"] = rest / rest_size if rest_size else np.full_like(rest, np.nan)
            if name in self._auxiliary:
                with torch.random.fork_rng(devices=[]):
                    observed["auxiliary"] = self._auxiliary[name].step()
            for arm, row in observed.items():
                writer.append_watch(batch.step, name, arm, row)
