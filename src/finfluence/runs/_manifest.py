"""What run.json says about a run: how it was trained, with what, where."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any, Literal

import torch

from finfluence.errors import InputError
from finfluence.runs.plan import Plan
from finfluence.runs.sampling import Sampler
from finfluence.tradeoff import SIGN_CONVENTION

SensitivityKind = Literal["live", "replay", "both"]
SignalKind = Literal["batch", "full"]
_PACKAGES = ("finfluence", "torch", "numpy", "polars", "pyarrow")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses an unknown value of an option.

    Raises:
        InputError: it is not one of the choices.
    """
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def environment() -> dict[str, Any]:
    """Versions and machine, enough to see why two runs differ."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "versions": versions,
        "environment": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "command": sys.argv[0],
        },
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its name, and the options of its first param group."""
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    plain = {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in group.items()}
    return {"name": type(optimizer).__name__} | plain


def describe_run(
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    *,
    seed: int | None,
    sensitivity: SensitivityKind,
    signals: SignalKind,
) -> dict[str, Any]:
    """The entries that every recorded run has."""
    return {
        "optimizer": describe_optimizer(optimizer),
        "sampler": sampler.kind,
        "drop_last": sampler.drop_last,
        "seed": seed,
        "sensitivity": sensitivity,
        "signals": signals,
        "sign_convention": SIGN_CONVENTION,
    }


def describe_plan(plan: Plan, n: int) -> dict[str, Any]:
    """The entries of a run that `train` made, from which its plan can be read back."""
    return {
        "plan": plan.as_dict(),
        "n_samples": n,
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "total_steps": plan.steps(n),
    }
