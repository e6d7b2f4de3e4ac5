"""The problems of the calibration benchmark: data, queries, subsets, networks and optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.workflows.digits import digits, flip_labels, mlp

N_QUERIES, N_SUBSETS = 40, 22


@dataclass(frozen=True)
class Data:
    """Training data with planted wrong labels, single-example queries and subsets to remove.

    The query "validation" is the mean loss on the validation set; it ranks the planted samples and is left out of
    the agreement.
    """

    dataset: TensorDataset
    queries: dict[str, Any]
    subsets: dict[str, np.ndarray]
    planted: np.ndarray


@dataclass(frozen=True)
class Setting:
    """One row of the table: `options` of both training and retraining, `replay` of the walk backwards."""

    name: str
    note: str
    data: Callable[[], Data]
    make_model: Callable[[int], nn.Module]
    optimizer: Any
    epochs: int = 20
    options: dict[str, Any] = field(default_factory=dict)
    replay: fi.ReplayOptions = field(default_factory=fi.ReplayOptions)


def assemble(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    *,
    planted: np.ndarray,
    subsets: dict[str, np.ndarray],
) -> Data:
    def tensors(pair: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(pair[0].astype(np.float32)), torch.from_numpy(pair[1].astype(np.int64))

    x, y = tensors(held_out)
    chosen = np.random.default_rng(0).choice(len(x), N_QUERIES, replace=False).tolist()
    queries: dict[str, Any] = {f"q{k}": (x[i : i + 1], y[i : i + 1]) for k, i in enumerate(chosen)}
    queries["validation"] = tensors(validation)
    return Data(TensorDataset(*tensors(train)), queries, {k: np.sort(v) for k, v in subsets.items()}, planted)


def random_subsets(n: int, size: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {f"random-{k}": generator.choice(n, size, replace=False) for k in range(N_SUBSETS)}


def coherent_subsets(labels: np.ndarray, planted: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Half of each class, four chunks of the wrong labels, eight clusters of similar images."""
    from sklearn.cluster import KMeans

    generator = np.random.default_rng(0)
    subsets = {f"label-{c}": generator.permutation(np.flatnonzero(labels == c))[:25] for c in range(10)}
    flips = generator.permutation(np.flatnonzero(planted))
    subsets |= {f"flips-{k}": part for k, part in enumerate(np.array_split(flips, 4))}
    distance = KMeans(n_clusters=8, n_init="auto", random_state=0).fit(pixels).transform(pixels)
    return subsets | {f"cluster-{k}": np.argsort(distance[:, k])[:25] for k in range(8)}


@functools.cache
def digits_data(family: str = "random") -> Data:
    """500 digits, 10 % of the labels flipped; 22 random subsets of 25, or 22 coherent ones of 12 to 25."""
    recipe = digits(samples=500)
    assert recipe.samples is not None
    pixels, labels = (t.numpy() for t in recipe.dataset.tensors)
    planted = recipe.samples["planted"].to_numpy()
    subsets = random_subsets(500, 25) if family == "random" else coherent_subsets(labels, planted, pixels)
    validation = tuple(t.numpy() for t in recipe.queries["validation"].tensors)
    held_out = tuple(t.numpy() for t in recipe.held_out.tensors)
    return assemble((pixels, labels), validation, held_out, planted=planted, subsets=subsets)


@functools.cache
def unbalanced_data() -> Data:
    """500 digits of which class c has a share proportional to 0.7^c, 10 % of the labels flipped."""
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    generator = np.random.default_rng(1)
    share = 0.7 ** np.arange(10)
    counts = np.maximum(np.floor(500 * share / share.sum()), 8).astype(int)
    counts[0] += 500 - counts.sum()
    counts = np.minimum(counts, 165)
    counts[1] += 500 - counts.sum()
    order = generator.permutation(len(labels))
    train = np.concatenate([order[labels[order] == c][: counts[c]] for c in range(10)])
    rest = np.setdiff1d(order, train)
    rest = generator.permutation(rest)
    noisy, planted = flip_labels(labels[train], 0.1, classes=10, seed=2)
    x = pixels / 16
    return assemble(
        (x[train], noisy),
        (x[rest[:400]], labels[rest[:400]]),
        (x[rest[400:]], labels[rest[400:]]),
        planted=planted,
        subsets=random_subsets(len(train), 25),
    )


@functools.cache
def text_data(remainder: int = 0) -> Data:
    """Dialogues of the ChatterBot corpus (BSD) as hashed bags of words, six topics, 10 % of the labels flipped.

    140 rows fill batches of 20; `remainder` more make a last batch of so many.
    """
    from importlib.resources import files

    import yaml
    from sklearn.feature_extraction.text import HashingVectorizer

    topics = ("ai", "computers", "history", "psychology", "science", "sports")
    texts: list[str] = []
    labels: list[int] = []
    for number, topic in enumerate(topics):
        source = files("chatterbot_corpus").joinpath(f"data/english/{topic}.yml").read_text(encoding="utf-8")
        spoken = {" ".join(map(str, pair)) for pair in yaml.safe_load(source)["conversations"]}
        texts += sorted(spoken)
        labels += [number] * len(spoken)
    hashed: Any = HashingVectorizer(n_features=256, alternate_sign=True).transform(texts)
    x = hashed.toarray()
    y = np.array(labels)
    order = np.random.default_rng(3).permutation(len(y))
    n = 140 + remainder
    train, rest = order[:n], order[n:]
    noisy, planted = flip_labels(y[train], 0.1, classes=len(topics), seed=4)
    half = len(rest) // 2
    return assemble(
        (x[train], noisy),
        (x[rest[:half]], y[rest[:half]]),
        (x[rest[half:]], y[rest[half:]]),
        planted=planted,
        subsets=random_subsets(n, n // 20),
    )


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def cnn(seed: int) -> nn.Module:
    """A small convolutional network with GroupNorm on 8×8 images given as 64 pixels."""
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 10),
        ),
        seed,
    )


def pooled_cnn(seed: int) -> nn.Module:
    """A small convolutional network with max pooling and nothing else that has kinks."""
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 12, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 10),
        ),
        seed,
    )


def text_mlp(seed: int) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 6)), seed)


def relu_mlp(seed: int) -> nn.Module:
    return mlp(seed, activation="relu")


_coherent = functools.partial(digits_data, "coherent")
FALLING = fi.Schedule("linear")
SETTINGS = {
    s.name: s
    for s in (
        Setting("tanh-sgd", "tanh MLP, SGD lr 0.05", digits_data, mlp, fi.SGD(lr=0.05)),
        Setting("relu-sgd", "ReLU MLP, SGD lr 0.03", digits_data, relu_mlp, fi.SGD(lr=0.03)),
        Setting("relu-adamw", "ReLU MLP, AdamW lr 0.002", digits_data, relu_mlp, fi.AdamW(lr=0.002)),
        Setting(
            "cnn-momentum",
            "CNN, SGD lr 0.0012 momentum 0.9",
            digits_data,
            cnn,
            fi.SGD(lr=0.0012, momentum=0.9),
        ),
        Setting(
            "cnn-pooled",
            "tanh CNN with max pooling, SGD lr 0.01 momentum 0.9, 10 epochs",
            digits_data,
            pooled_cnn,
            fi.SGD(lr=0.01, momentum=0.9),
            epochs=10,
        ),
        Setting("tanh-sgd-coherent", "tanh MLP, SGD lr 0.05, coherent subsets", _coherent, mlp, fi.SGD(lr=0.05)),
        Setting("tanh-sgd-fast", "tanh MLP, SGD lr 0.2", digits_data, mlp, fi.SGD(lr=0.2)),
        Setting("tanh-sgd-100", "tanh MLP, SGD lr 0.05, 100 epochs", digits_data, mlp, fi.SGD(lr=0.05), epochs=100),
        Setting("unbalanced", "tanh MLP, SGD lr 0.05, unbalanced classes", unbalanced_data, mlp, fi.SGD(lr=0.05)),
        Setting(
            "relu-unbalanced",
            "ReLU MLP, SGD lr 0.03, unbalanced classes",
            unbalanced_data,
            relu_mlp,
            fi.SGD(lr=0.03),
        ),
        Setting("relu-adamw-slow", "ReLU MLP, AdamW lr 0.001", digits_data, relu_mlp, fi.AdamW(lr=0.001)),
        Setting("tanh-adamw", "tanh MLP, AdamW lr 0.002", digits_data, mlp, fi.AdamW(lr=0.002)),
        *(
            Setting(
                f"{name}-falling", f"{note}, falling to 0", digits_data, net, optimizer, options={"schedule": FALLING}
            )
            for name, note, net, optimizer in (
                ("tanh-sgd", "tanh MLP, SGD lr 0.05", mlp, fi.SGD(lr=0.05)),
                ("tanh-adamw", "tanh MLP, AdamW lr 0.002", mlp, fi.AdamW(lr=0.002)),
                ("relu-adamw", "ReLU MLP, AdamW lr 0.002", relu_mlp, fi.AdamW(lr=0.002)),
            )
        ),
        Setting("text", "topics of questions, tanh MLP, AdamW lr 0.002", text_data, text_mlp, fi.AdamW(lr=0.002)),
        Setting(
            "text-remainder",
            "the same, last batch of one",
            functools.partial(text_data, 1),
            text_mlp,
            fi.AdamW(lr=0.002),
        ),
    )
}


def sample_table(data: Data) -> pl.DataFrame:
    return pl.DataFrame({"sample": np.arange(len(data.planted), dtype=np.int64), "planted": data.planted})
