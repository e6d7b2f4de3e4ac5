"""The arms of a retraining experiment, what names a training in it, and where its randomness comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finfluence.errors import InputError, OracleError
from finfluence.influence.subsets import Ids, SampleIndex

BASE = "base"
TrainingBudget = Literal["steps", "epochs"]
Orders = Literal["paired", "independent"]
_RUN_STREAM = 0x0AC1E


@dataclass(frozen=True)
class Arm:
    """One training set: all samples but the removed ones.

    Attributes:
        key: names the arm by what it removes, so the same removal under another name is the same arm.
        removed: (k,) int64 rows of the dataset, ascending; empty for the base arm.
    """

    key: str
    removed: np.ndarray

    def kept(self, n: int) -> np.ndarray:
        """(n - k,) int64 rows that the arm trains on, ascending."""
        mask = np.ones(n, dtype=bool)
        mask[self.removed] = False
        return np.flatnonzero(mask)


def make_arm(removed: np.ndarray) -> Arm:
    """The arm without the given rows."""
    rows = np.unique(np.asarray(removed, dtype=np.int64))
    key = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] if len(rows) else BASE
    return Arm(key, rows)


def make_arms(subsets: Mapping[str, Ids], index: SampleIndex, batch_size: int) -> dict[str, Arm]:
    """One arm for each named subset.

    Args:
        subsets: sample ids by name.
        index: ids of all samples.
        batch_size: of the training; what is left of the data must fill a batch.

    Returns:
        The arm without each subset, by the subset's name.

    Raises:
        InputError: no subset, or one that is empty, the whole training set, or has unknown or repeated ids.
        OracleError: a subset leaves fewer samples than a batch holds.
    """
    if not isinstance(subsets, Mapping) or not subsets:
        raise InputError('subsets must be a non-empty mapping from name to sample ids, for example {"web": ids}')
    for name in subsets:
        if not isinstance(name, str) or not name:
            raise InputError(f"a subset's name must be a non-empty string, got {name!r}")
    packed = index.pack(subsets)
    arms = {name: make_arm(packed.codes_of(row)) for row, name in enumerate(packed.names)}
    for name, arm in arms.items():
        if len(index) - len(arm.removed) < batch_size:
            raise OracleError(
                f"without subset {name!r} only {len(index) - len(arm.removed)} of {len(index)} samples are left, fewer "
                f"than the batch size {batch_size}; choose a smaller subset or batch"
            )
    return arms


def run_seed(seed: int, arm: str, run: int, *, orders: Orders = "paired") -> int:
    """Seed of one training: a function of the experiment's seed, the run's index and, unless paired, the arm.

    Adding runs or subsets changes no training that was there.
    """
    words: list[int] = []
    if orders == "independent":
        words = np.frombuffer(hashlib.sha256(arm.encode()).digest()[:16], dtype="<u4").tolist()
    state = np.random.SeedSequence([seed, _RUN_STREAM, *words, run]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
