"""Runs the peers' adapters (`benchmarks/peers/`) in their own environments and reads their scores."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._methods import Scores, Training
from benchmarks.peers.common import State

ROOT = Path(__file__).parent.parent
# folder of the environment → what `pip install` needs there beside torch==2.13.0 and numpy
REQUIREMENTS = {
    "captum": "captum==0.9.0",
    "dattri": "dattri==0.3.0",
    "kronfluence": "kronfluence==1.0.1",
    "traker": "traker==0.3.2",
    "pydvl": "pyDVL==0.10.0 distributed zarr",
    "dattri-llm": "dattri-llm[transformers]==0.1.0",
    "cleanlab": "cleanlab==2.9.0 scikit-learn",
}

# the same for those that score language models, in `python -m benchmarks poison`
TEXT_REQUIREMENTS = {
    "bergson": "bergson==2.5.1",
    "dattri-llm": "dattri-llm[transformers]==0.1.0 peft",
}


# Installs, and is not in these tables all the same.
NOT_COMPARED = {
    "bergson 2.5.1": "its pipelines take Hugging Face language models and token data, and its gradient collector "
    "asserts activations of shape [N, S, I], so these image classifiers cannot be given to it; it is in the table of "
    "poisoned instruction rows (python -m benchmarks poison --peers)",
}


@dataclass(frozen=True)
class Peer:
    """A method of a peer.

    Attributes:
        name: as tables show it.
        environment: folder of its environment.
        module: adapter in benchmarks.peers.
        method: the adapter's name for it.
        needs: "ensemble" (independently trained models) or "probabilities" (of cross-validation), "" for one training.
        most_parameters: networks with more are left out, for memory or time.
    """

    name: str
    environment: str
    module: str
    method: str
    needs: str = ""
    most_parameters: float = float("inf")


PEERS = (
    Peer("captum TracInCP", "captum", "captum_", "tracin"),
    Peer("captum TracInCPFast", "captum", "captum_", "fast"),
    Peer("dattri TracIn", "dattri", "dattri_", "tracin"),
    Peer("dattri influence function", "dattri", "dattri_", "influence"),
    Peer("dattri TRAK", "dattri", "dattri_", "trak", "ensemble"),
    Peer("dattri EK-FAC", "dattri", "dattri_", "ekfac"),
    Peer("kronfluence EK-FAC", "kronfluence", "kronfluence_", "ekfac"),
    Peer("traker TRAK, 1 model", "traker", "traker_", "single"),
    Peer("traker TRAK, 10 models", "traker", "traker_", "ensemble", "ensemble"),
    Peer("pydvl influence", "pydvl", "pydvl_", "influence", "", 20_000),
    Peer("pydvl Data-Banzhaf (logistic)", "pydvl", "pydvl_", "banzhaf"),
    Peer("dattri-llm TracIn", "dattri-llm", "dattri_llm_", "tracin"),
    Peer("cleanlab", "cleanlab", "cleanlab_", "quality", "probabilities"),
)


@dataclass
class PeerScores:
    """What an adapter wrote.

    Attributes:
        scores: (k, n), positive where the sample lowers the query's loss; None where the method has no query.
        own: (n,) self-influence or label quality, higher is more suspect; None without.
        flagged: (n,) bool where the method decides.
        about: package, version, seconds, peak_mb, before_mb, settings.
    """

    scores: np.ndarray | None
    own: np.ndarray | None
    flagged: np.ndarray | None
    about: dict[str, Any]


def python_of(folder: Path | None, environment: str) -> Path | None:
    """The environment's Python, or None where it is not there."""
    if folder is None:
        return None
    for place in ("bin/python", "Scripts/python.exe"):
        found = folder.absolute() / environment / place
        if found.exists():
            return found
    return None


def missing(folder: Path | None, required: Collection[str] = tuple(REQUIREMENTS)) -> list[str]:
    """Environments that are not there."""
    return [name for name in required if python_of(folder, name) is None]


def write_problem(path: Path, training: Training, queries: tuple[np.ndarray, np.ndarray], **more: Any) -> None:
    """Writes what adapters read; `more` may hold ensemble (list of states) and extra (arrays by name)."""
    arrays: dict[str, Any] = {
        "spec": np.array(training.problem.network),
        "rates": np.array(training.rates),
        "train_x": training.problem.train[0],
        "train_y": training.problem.train[1],
        "query_x": queries[0],
        "query_y": queries[1],
    }
    ensemble: list[State] = more.get("ensemble") or []
    for prefix, states in (("checkpoint", training.checkpoints), ("ensemble", ensemble)):
        for number, state in enumerate(states):
            arrays |= {f"{prefix}/{number}/{name}": value.numpy() for name, value in state.items()}
    arrays |= {f"extra/{name}": value for name, value in (more.get("extra") or {}).items()}
    np.savez(path, **arrays)


def run_peer(peer: Peer, problem: Path, *, folder: Path | None, timeout: float = 480) -> PeerScores | str:
    """Runs one adapter.

    Returns:
        Its scores, or one line that says why there are none.
    """
    python = python_of(folder, peer.environment)
    if python is None:
        return "no environment"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "scores.npz"
        command = [str(python), "-m", f"benchmarks.peers.{peer.module}", str(problem), str(out), peer.method]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return f"did not finish in {timeout:.0f} s"
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            return f"failed: {last[0].strip()[:200]}"
        with np.load(out) as file:
            arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays["about"]))
    return PeerScores(arrays.get("scores"), arrays.get("own"), arrays.get("flagged"), about)


def peer_scores(
    training: Training, *, ensemble: list[State], peers: Path, skip: Collection[str], failures: dict[str, str]
) -> dict[tuple[str, str], Scores]:
    """Every peer's scores of one training: harm to the query, or what a sample does to itself.

    Args:
        training: the training that is scored.
        ensemble: states of independent trainings, for the methods that ask for them.
        peers: folder of the environments.
        skip: names of peers that are left out.
        failures: peers that did not run and why; those in it are left out, and new ones are entered.

    Returns:
        (use, peer) → scores, higher is more suspect; use is "query" or "self".
    """
    scores: dict[tuple[str, str], Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        extra = {"probabilities": cross_validated(training)}
        write_problem(path, training, training.problem.asked, ensemble=ensemble, extra=extra)
        for peer in PEERS:
            if peer.name in failures or peer.name in skip:
                continue
            result = run_peer(peer, path, folder=peers)
            if isinstance(result, str):
                failures[peer.name] = result
                continue
            if result.scores is not None:
                scores["query", peer.name] = Scores(-result.scores.mean(axis=0))
            if result.own is not None:
                scores["self", peer.name] = Scores(result.own, result.flagged)
    return scores


def cross_validated(training: Training, *, folds: int = 5) -> np.ndarray:
    """(n, classes) out-of-sample probabilities of the problem's own network, by cross-validation."""
    import torch

    from benchmarks._methods import plan
    from benchmarks.peers.common import network
    from finfluence.runs import ClassificationTask, Engine

    problem = training.problem
    x = torch.from_numpy(problem.train[0])
    n = len(problem.planted)
    order = np.random.default_rng([training.seed, folds]).permutation(n)
    found = np.zeros((n, 10))
    for part in np.array_split(order, folds):
        model = network(problem.network, seed=training.start)
        rest = np.setdiff1d(np.arange(n), part)
        engine = Engine(
            ClassificationTask(), model, dataset=problem.dataset, plan=plan(problem, training.seed), subset=rest
        )
        for batch in engine.batches():
            engine.step(batch)
        with torch.no_grad():
            found[part] = model(x[torch.from_numpy(part)]).softmax(-1).numpy()
    return found
