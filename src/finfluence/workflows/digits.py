"""The demonstration task: scikit-learn's handwritten digits with some labels flipped, and a small MLP."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from finfluence.errors import InputError
from finfluence.runs import ClassificationTask, Plan
from finfluence.sensitivity import SGD, AdamW
from finfluence.workflows.recipes import Recipe

Activation = Literal["tanh", "relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def mlp(seed: int, *, hidden: int = 32, activation: Activation = "tanh") -> nn.Sequential:
    """A 64-hidden-10 network whose initial parameters are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, hidden), _ACTIVATIONS[activation](), nn.Linear(hidden, 10))


def flip_labels(labels: np.ndarray, fraction: float, *, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces a random fraction of labels with a different class.

    Args:
        labels: (n,) int64.
        fraction: share of labels to flip, in [0, 1).
        classes: number of classes.
        seed: of the choice.

    Returns:
        (n,) labels with flips, and (n,) bool, which ones were flipped.

    Raises:
        InputError: the fraction is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"the flipped fraction must lie in [0, 1), got {fraction}")
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[generator.choice(len(labels), round(fraction * len(labels)), replace=False)] = True
    shift = generator.integers(1, classes, size=len(labels))
    return np.where(flipped, (labels + shift) % classes, labels), flipped


def digits(
    *,
    samples: int = 1000,
    flipped: float = 0.1,
    hidden: int = 32,
    activation: Activation = "tanh",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    learning_rate: float | None = None,
    epochs: int = 20,
    batch_size: int = 20,
    seed: int = 0,
) -> Recipe:
    """Handwritten digits with flipped labels.

    Args:
        samples: training samples drawn from the 1,797; the rest is split into the validation query and held-out data.
        flipped: share of training labels that are replaced with a wrong class.
        hidden: width of the hidden layer.
        activation: "tanh" or "relu".
        optimizer: "sgd" (lr 0.1) or "adamw" (lr 0.003).
        learning_rate: another learning rate.
        epochs: passes over the data.
        batch_size: samples a step.
        seed: of the data split, the flips, the batch order and the initial parameters.

    Returns:
        The recipe; its sample table has columns sample, label (as trained on), true_label and planted.

    Raises:
        InputError: more samples than the data set can give.
    """
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)
    pixels, labels = np.asarray(values, dtype=np.float32) / 16.0, np.asarray(targets, dtype=np.int64)
    if not batch_size <= samples <= len(labels) - 200:
        raise InputError(
            f"samples must lie between the batch size and {len(labels) - 200} (200 are held back), got {samples}"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    train, rest = order[:samples], order[samples:]
    validation, held_out = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    noisy, planted = flip_labels(labels[train], flipped, classes=10, seed=seed + 1)

    def dataset(rows: np.ndarray, targets: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.from_numpy(pixels[rows]), torch.from_numpy(targets))

    rates = {"sgd": 0.1, "adamw": 0.003}
    rate = rates[optimizer] if learning_rate is None else learning_rate
    arguments = {
        "samples": samples,
        "flipped": flipped,
        "hidden": hidden,
        "activation": activation,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    return Recipe(
        task=ClassificationTask(),
        make_model=functools.partial(mlp, hidden=hidden, activation=activation),
        dataset=dataset(train, noisy),
        queries={"validation": dataset(validation, labels[validation])},
        plan=Plan(
            optimizer=SGD(lr=rate) if optimizer == "sgd" else AdamW(lr=rate),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
        ),
        image_shape=(8, 8),
        samples=pl.DataFrame(
            {
                "sample": np.arange(samples, dtype=np.int64),
                "label": noisy,
                "true_label": labels[train],
                "planted": planted,
            }
        ),
        held_out=dataset(held_out, labels[held_out]),
        reference={"function": "finfluence.workflows.digits:digits", "arguments": arguments},
    )
