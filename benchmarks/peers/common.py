"""What every adapter needs, with torch and NumPy alone: the network, the problem and the scores."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

State = dict[str, Tensor]


def network(spec: str, *, seed: int = 0) -> nn.Sequential:
    """A network by name: "mlp-64-32-10-tanh", "mlp-784-64-10-relu", "cnn-8" or "cnn-28" (inputs are flat images)."""
    kind, *rest = spec.split("-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            *widths, activation = rest
            sizes = [int(width) for width in widths]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(sizes):
                layers += [nn.Linear(a, b), nn.Tanh() if activation == "tanh" else nn.ReLU()]
            return nn.Sequential(*layers[:-1])
        side = int(rest[0])
        left = side // 4
        return nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * left * left, 10),
        )


@dataclass
class Problem:
    """What a peer scores: train (n, d), queries (k, d), checkpoints of one training, finals of others."""

    spec: str
    train: TensorDataset
    queries: TensorDataset
    checkpoints: list[State]
    rates: list[float]
    ensemble: list[State]
    extra: dict[str, np.ndarray]

    @property
    def model(self) -> nn.Sequential:
        """A fresh network with the last checkpoint's parameters."""
        made = network(self.spec)
        made.load_state_dict(self.checkpoints[-1])
        return made

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.checkpoints[-1].values())


def read(path: str | Path) -> Problem:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}

    def states(prefix: str) -> list[State]:
        found: dict[int, State] = {}
        for name, array in arrays.items():
            if name.startswith(prefix + "/"):
                _, number, parameter = name.split("/")
                found.setdefault(int(number), {})[parameter] = torch.from_numpy(array)
        return [found[number] for number in sorted(found)]

    pairs = {
        part: TensorDataset(torch.from_numpy(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"]))
        for part in ("train", "query")
    }
    return Problem(
        spec=str(arrays["spec"]),
        train=pairs["train"],
        queries=pairs["query"],
        checkpoints=states("checkpoint"),
        rates=arrays["rates"].tolist(),
        ensemble=states("ensemble"),
        extra={name.removeprefix("extra/"): array for name, array in arrays.items() if name.startswith("extra/")},
    )


def sample_loss(model: nn.Module, parameters: Any, sample: Any) -> Tensor:
    """Cross-entropy of one sample (x (d,), y ()) under functional parameters."""
    x, y = sample
    logits = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
    return functional.cross_entropy(logits, y.unsqueeze(0))


@dataclass
class Found:
    """Scores of a method, positive where the sample lowers the query's loss.

    Attributes:
        scores: (k, n) or None.
        own: (n,) self-influence, or None.
        settings: how the method was set, in words.
        flagged: (n,) bool where the method itself decides.
    """

    settings: str
    scores: Any = None
    own: Any = None
    flagged: Any = None


def peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text(encoding="ascii").splitlines() if row.startswith("VmHWM"))
        return float(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def run_adapter(
    package: str, methods: Mapping[str, Callable[[Any], Found]], *, reader: Callable[[str], Any] = read
) -> None:
    """The adapter's command line: scores, processor seconds without imports, and the process's peak memory.

    Args:
        package: whose version is noted.
        methods: by the name that the command line gives; each takes what `reader` makes of the problem's path.
        reader: of the problem.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("problem")
    parser.add_argument("scores")
    parser.add_argument("method", choices=list(methods))
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = reader(options.problem)
    torch.manual_seed(0)
    before = peak_mb()
    began = time.process_time()
    found = methods[options.method](problem)
    about = {
        "package": package,
        "version": version(package),
        "seconds": time.process_time() - began,
        "peak_mb": peak_mb(),
        "before_mb": before,
        "settings": found.settings,
    }
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for name in ("scores", "own", "flagged"):
        value = getattr(found, name)
        if value is not None:
            arrays[name] = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    np.savez(options.scores, **arrays)
