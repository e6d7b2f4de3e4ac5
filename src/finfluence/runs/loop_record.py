"""What a loop that the user owns did, step by step: enough to do it again, and so to replay it.

The reference loop can be repeated from its plan. Somebody else's loop has no plan: which rows made up a micro-batch,
what their losses were divided by, the learning rates and where dropout's random numbers started are written down while
it runs (`runs._loop_writer`). One file covers the steps between two stored states (`runs.states`), and is named after
the state it leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finfluence.errors import StoreError
from finfluence.runs.engine import RandomState
from finfluence.runs.states import StateStore
from finfluence.signals import Folder

LOOP_FOLDER = "loop"


@dataclass
class LoopPart:
    """One micro-batch.

    Attributes:
        rows: (b,) int64, rows of the dataset.
        denominator: what the sum of the rows' losses was divided by.
        random: state of torch's generators (CPU, CUDA) before its forward pass; None where nothing was drawn.
    """

    rows: np.ndarray
    denominator: float
    random: RandomState | None = None


@dataclass
class LoopStep:
    """One optimizer step.

    Attributes:
        epoch: index of the epoch.
        position: index of the step in its epoch.
        rates: learning rate of every param group.
        parts: its micro-batches.
    """

    epoch: int
    position: int
    rates: tuple[float, ...]
    parts: list[LoopPart]


def read_steps(folder: Folder, cut: int) -> list[LoopStep]:
    """The steps that led to the state before step `cut`, from the state before it on.

    Raises:
        StoreError: the record is missing or damaged.
    """
    packed = StateStore(folder, LOOP_FOLDER).load(cut)
    sizes = packed["sizes"].tolist()
    rows = np.split(packed["rows"].numpy(), np.cumsum(sizes)[:-1])
    random: dict[int, RandomState] = {}
    cuda = packed.get("random_cuda")
    for place, part in enumerate(packed["random_of"].tolist()):
        # clones: a generator's state is read as a structure, which a view into a file's bytes need not be aligned for
        random[part] = packed["random"][place].clone(), None if cuda is None else cuda[place].clone()
    parts = [
        LoopPart(own, denominator, random.get(i))
        for i, (own, denominator) in enumerate(zip(rows, packed["denominators"].tolist(), strict=True))
    ]
    steps = [
        LoopStep(int(epoch), int(position), tuple(rates), [])
        for (epoch, position), rates in zip(packed["places"].tolist(), packed["rates"].tolist(), strict=True)
    ]
    for step, part in zip(packed["step_of"].tolist(), parts, strict=True):
        steps[step].parts.append(part)
    return steps


def build_optimizer(loop: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The loop's optimizer over a model's parameters.

    Args:
        loop: the entry of run.json.
        parameters: trainable parameters by name.

    Raises:
        StoreError: the model has other trainable parameters than the recorded one.
    """
    known = {name for group in loop["groups"] for name in group["parameters"]}
    if different := sorted(known.symmetric_difference(parameters)):
        raise StoreError(
            f"the model does not match the recorded one: {different[0]!r} is trained on one side only; build it with "
            "the code that recorded the run"
        )
    groups = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in group["options"].items()}
        | {"params": [parameters[name] for name in group["parameters"]]}
        for group in loop["groups"]
    ]
    return getattr(torch.optim, loop["optimizer"])(groups, lr=0.0)


def packed_steps(steps: Sequence[LoopStep]) -> dict[str, Tensor]:
    """The steps as tensors, which `read_steps` takes apart again."""
    parts = [(number, part) for number, step in enumerate(steps) for part in step.parts]
    drawn = [(i, part.random) for i, (_, part) in enumerate(parts) if part.random is not None]
    packed = {
        "places": torch.tensor([(step.epoch, step.position) for step in steps], dtype=torch.int64),
        "rates": torch.tensor([step.rates for step in steps], dtype=torch.float64),
        "step_of": torch.tensor([number for number, _ in parts], dtype=torch.int64),
        "sizes": torch.tensor([len(part.rows) for _, part in parts], dtype=torch.int64),
        "denominators": torch.tensor([part.denominator for _, part in parts], dtype=torch.float64),
        "rows": torch.from_numpy(np.concatenate([part.rows for _, part in parts])),
        "random_of": torch.tensor([i for i, _ in drawn], dtype=torch.int64),
    }
    if drawn:
        packed["random"] = torch.stack([cpu for _, (cpu, _) in drawn])
        if all(cuda is not None for _, (_, cuda) in drawn):
            packed["random_cuda"] = torch.stack([cuda for _, (_, cuda) in drawn if cuda is not None])
    return packed
