"""Data of the evidence benchmarks: digits from scikit-learn, MNIST and Fashion-MNIST from IDX files; planted noise."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import finfluence as fi

Pair = tuple[np.ndarray, np.ndarray]
NOISES = ("uniform", "class-conditional", "near-class", "duplicated", "shifted", "backdoor")


@dataclass(frozen=True)
class Problem:
    """A training with planted bad rows.

    Attributes:
        name: of data and network.
        train: (n, d) inputs and (n,) labels as trained on.
        validation: clean inputs and labels; their mean loss is the query "validation".
        planted: (n,) bool, the rows that are bad.
        network: see `benchmarks.peers.common.network`.
        query: inputs and labels of the behaviour that the planted rows change, where it is not the validation loss.
        schedule: of the learning rate.
    """

    name: str
    train: Pair
    validation: Pair
    planted: np.ndarray
    network: str
    optimizer: Any = field(default_factory=lambda: fi.SGD(lr=0.05))
    epochs: int = 20
    batch_size: int = 20
    query: Pair | None = None
    schedule: fi.Schedule = field(default_factory=fi.Schedule)

    @property
    def dataset(self) -> TensorDataset:
        return tensors(self.train)

    @property
    def asked(self) -> Pair:
        """The query's samples."""
        return self.validation if self.query is None else self.query


def tensors(pair: Pair) -> TensorDataset:
    return TensorDataset(torch.from_numpy(pair[0]), torch.from_numpy(pair[1]))


def digits() -> Pair:
    """1,797 images of 8×8, in [0, 1]."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    return np.asarray(values, dtype=np.float32) / 16, np.asarray(targets, dtype=np.int64)


def idx(folder: Path, part: str) -> Pair:
    """Images (n, 784) in [0, 1] and labels of an IDX data set, gzipped or not; `part` is "train" or "t10k".

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is not IDX.
    """

    def read(kind: str) -> np.ndarray:
        found = next(iter(sorted(folder.glob(f"{part}-{kind}*"))), None)
        if found is None:
            raise FileNotFoundError(f"{folder} has no file {part}-{kind}*; --data takes a folder with IDX files")
        raw = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
        if raw[:2] != b"\0\0" or raw[2] != 8:
            raise ValueError(f"{found.name} does not start like an IDX file of bytes")
        shape = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

    images, labels = read("images"), read("labels")
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int64)


def sources(folders: list[Path], *, samples: int) -> dict[str, tuple[Pair, Pair]]:
    """(train, rest) of each data set by name: digits always, and one a folder of IDX files."""
    x, y = digits()
    order = np.random.default_rng(0).permutation(len(y))
    found = {"digits": ((x[order[:500]], y[order[:500]]), (x[order[500:]], y[order[500:]]))}
    for folder in folders:
        (x, y), (u, v) = idx(folder, "train"), idx(folder, "t10k")
        rows = np.random.default_rng(0).choice(len(y), samples, replace=False)
        rest = np.random.default_rng(1).choice(len(v), 1000, replace=False)
        rest = np.concatenate([rest, np.setdiff1d(np.arange(len(v)), rest)])
        found[folder.name] = ((x[rows], y[rows]), (u[rest], v[rest]))
    return found


def clean_problem(
    name: str,
    data: tuple[Pair, Pair],
    *,
    model: str,
    quick: bool = False,
    settling: bool = False,
    validation: int = 200,
) -> Problem:
    """A problem without bad rows.

    Args:
        name: of the data.
        data: training and validation pairs.
        model: "mlp" or "cnn".
        quick: a fifth of everything.
        settling: 20 epochs in which the rate falls linearly from 0.1 to 0; otherwise it is constant, for 20 epochs of
            digits and 5 of larger images. Batches have 20 and 50 samples.
        validation: samples of the validation query.
    """
    (x, y), (u, v) = data
    if quick:
        x, y, u, v = x[:200], y[:200], u[:60], v[:60]
    side = int(x.shape[1] ** 0.5)
    small = side == 8
    network = f"cnn-{side}" if model == "cnn" else ("mlp-64-32-10-tanh" if small else "mlp-784-32-10-tanh")
    rate = 0.05 if model == "mlp" and not settling else 0.1
    epochs = 20 if small or settling else 5
    return Problem(
        name=f"{name}, {model.upper()}{', rate to 0' if settling else ''}",
        train=(x, y),
        validation=(u[:validation], v[:validation]),
        planted=np.zeros(len(y), dtype=bool),
        network=network,
        optimizer=fi.SGD(lr=rate),
        epochs=2 if quick else epochs,
        batch_size=20 if small else 50,
        schedule=fi.Schedule("linear" if settling else "constant"),
    )


def named_by_query(problem: Problem, validation: int, *, usual: int) -> Problem:
    """The problem, with the number of validation samples in its name where that is not the usual one."""
    if validation == usual:
        return problem
    return replace(problem, name=f"{problem.name}, {validation:,} validation samples")


def with_noise(problem: Problem, kind: str, share: float, *, seed: int) -> Problem:
    """Plants bad rows of a kind.

    - uniform: another class, all wrong classes alike.
    - class-conditional: class c becomes c + 1, as an annotator who confuses two classes; only classes 0 to 4 suffer.
    - near-class: the row becomes the second most likely class of a linear model, the flips that look right.
    - duplicated: one wrong sample in every ten bad rows, each repeated ten times, so that it is fitted well.
    - shifted: half of the images of two classes pulled half way to another class's mean, their labels kept: harmful
      to the boundary, and fitted as well as any.
    - backdoor: a bright corner and the label 0; the query is triggered validation images with their true labels.

    Args:
        problem: clean.
        kind: one of `NOISES`.
        share: of the rows.
        seed: of the choice.
    """
    generator = np.random.default_rng([seed, NOISES.index(kind)])
    (x, y), n = problem.train, len(problem.train[1])
    x, y = x.copy(), y.copy()
    count = round(share * n)
    planted = np.zeros(n, dtype=bool)
    query = None
    if kind == "class-conditional":
        eligible = np.flatnonzero(y < 5)
        rows = generator.choice(eligible, min(count, len(eligible) * 9 // 10), replace=False)
        y[rows] = y[rows] + 1
    elif kind == "near-class":
        rows = _confusable(x, y, count)
        y[rows] = _second_choice(x, problem.train[1])[rows]
    elif kind == "duplicated":
        rows = generator.choice(n, count, replace=False)
        for group in np.array_split(rows, max(1, count // 10)):
            x[group], wrong = x[group[0]], (y[group[0]] + generator.integers(1, 10)) % 10
            y[group] = wrong
    elif kind == "shifted":
        means = np.stack([x[y == c].mean(axis=0) for c in range(10)])
        parts = [np.flatnonzero(y == c)[: min(count // 2, int((y == c).sum()) // 2)] for c in (3, 5)]
        for part, target in zip(parts, (8, 9), strict=True):
            x[part] = 0.5 * x[part] + 0.5 * means[target]
        rows = np.concatenate(parts)
    elif kind == "backdoor":
        rows = generator.choice(np.flatnonzero(y != 0), count, replace=False)
        x[rows], y[rows] = trigger(x[rows]), 0
        u, v = problem.validation
        others = v != 0
        query = (trigger(u[others]), v[others])
    else:
        rows = generator.choice(n, count, replace=False)
        y[rows] = (y[rows] + generator.integers(1, 10, len(rows))) % 10
    planted[rows] = True
    return replace(problem, train=(x, y), planted=planted, query=query)


def trigger(images: np.ndarray) -> np.ndarray:
    """The images with the upper left corner (a quarter of the side) at full brightness."""
    side = int(images.shape[1] ** 0.5)
    marked = images.reshape(-1, side, side).copy()
    marked[:, : side // 4, : side // 4] = 1.0
    return marked.reshape(len(images), -1)


def _linear(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, 10) log-probabilities of a logistic regression on the clean data."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=300, C=0.1).fit(x, y).predict_log_proba(x)


def _second_choice(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scores = _linear(x, y)
    scores[np.arange(len(y)), y] = -np.inf
    return scores.argmax(axis=1)


def _confusable(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """The rows whose second choice is closest to their own class."""
    scores = _linear(x, y)
    own = scores[np.arange(len(y)), y]
    scores[np.arange(len(y)), y] = -np.inf
    return np.argsort(own - scores.max(axis=1), kind="stable")[:count]
