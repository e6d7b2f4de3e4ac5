"""Checkpoints of a run: what it takes to go on training from a step, or to replay a segment.

One safetensors file a state: trainable parameters, buffers and the optimizer's tensors, with the step in its metadata.
A file is written under a temporary name and renamed, so a killed run never leaves a half state behind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from finfluence.errors import ReplayError, StoreError
from finfluence.signals import Folder

_STATE_NAME = re.compile(r"step-(\d{9})\.safetensors$")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as tensors named "optimizer/<parameter>/<key>".

    Args:
        optimizer: a torch optimizer.
        names: parameter name by id(parameter).
    """
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is None:
                continue
            tensors[f"optimizer/{names[id(parameter)]}/{key}"] = (
                value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
            )
    return tensors


class StateStore:
    """The checkpoints under one folder of a run directory.

    Args:
        directory: the run directory.
        folder: name of the folder inside it.
    """

    def __init__(self, directory: Folder, folder: str = "states") -> None:
        self.directory, self.folder = directory, folder

    def steps(self) -> list[int]:
        """Steps before which a state was stored, ascending."""
        found = (_STATE_NAME.search(name) for name in self.directory.names(self.folder))
        return sorted(int(match.group(1)) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores tensors as the state before `step`."""
        # clones: safetensors refuses tensors that share memory (tied weights), and wants them contiguous
        payload = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"step": str(step)})
        self.directory.write(f"{self.folder}/step-{step:09d}.safetensors", payload)

    def load(self, step: int) -> dict[str, Tensor]:
        """The tensors stored before `step`.

        Raises:
            StoreError: there is no such state, or its file is damaged.
        """
        name = f"{self.folder}/step-{step:09d}.safetensors"
        try:
            return load(self.directory.read(name))
        except FileNotFoundError:
            raise StoreError(
                f"{self.directory.path(name)} is missing; the run cannot be continued or replayed"
            ) from None
        except Exception as error:  # safetensors raises its own and several built-in types
            raise StoreError(f"{self.directory.path(name)} is not a readable state ({error}); restore it") from error

    def digest(self, step: int) -> str:
        """A hash of the state stored before `step`, which tells one training's from another's."""
        content = self.directory.read(f"{self.folder}/step-{step:09d}.safetensors")
        return hashlib.sha256(content).hexdigest()[:16]

    def keep_only(self, step: int) -> None:
        """Deletes the states of all other steps."""
        for other in self.steps():
            if other != step:
                self.remove(other)

    def remove(self, step: int) -> None:
        """Deletes the state before `step`."""
        self.directory.remove(f"{self.folder}/step-{step:09d}.safetensors")


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a step changes: trainable parameters, buffers, optimizer state."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"parameter/{k}": p.detach() for k, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"buffer/{k}": b.detach() for k, b in model.named_buffers()}
    return tensors | optimizer_tensors(optimizer, names)


def restore_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts a stored state back into a model and its optimizer, in place.

    Raises:
        ReplayError: the model has other parameters or shapes than the stored one.
    """
    parameters: dict[str, Tensor] = {f"parameter/{k}": p for k, p in model.named_parameters() if p.requires_grad}
    targets = parameters | {f"buffer/{k}": b for k, b in model.named_buffers()}
    stored = {k for k in tensors if not k.startswith("optimizer/")}
    if missing := sorted(stored.symmetric_difference(targets)):
        raise ReplayError(
            f"the model does not match the recorded one: {missing[0].split('/', 1)[1]!r} is on one side only; "
            "build it with the code that recorded the run"
        )
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise ReplayError(
                    f"{name.split('/', 1)[1]!r} has shape {tuple(target.shape)} but was recorded with "
                    f"{tuple(tensors[name].shape)}; build the model with the code that recorded the run"
                )
            target.copy_(tensors[name])
    optimizer.state.clear()
    beside = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, entry = key[len("optimizer/") :].rsplit("/", 1)
            # torch keeps the step counter of Adam on the CPU, unless it is fused, and all else beside the parameter
            on_cpu = entry == "step" and id(by_name[name]) not in beside
            states.setdefault(name, {})[entry] = value.clone() if on_cpu else value.to(by_name[name].device).clone()
    for name, state in states.items():
        optimizer.state[by_name[name]] = state
