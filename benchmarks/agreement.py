"""Agreement with retraining, of finfluence and of every peer, on the same queries and the same subsets.

    python -m benchmarks agreement --peers PEERS
    python -m benchmarks agreement --runs 64     # finfluence and the baseline; peers' rows of an earlier record stay

500 digits with 10 % wrong labels, a 64-32-10 tanh MLP, batch 20, fixed initialisation; 22 random subsets of 25 samples
and 40 single-example queries; SGD (lr 0.05) and AdamW (lr 0.002) at 1, 3 and 20 epochs. Truth: retraining with and
without each subset. Every method sees recorded runs or checkpoints of the same trainings, and a subset's score is the
sum of its samples' scores. The rank agreement (mean over queries of the Spearman correlation over subsets, the linear
datamodelling score) is given beside its ceiling, which the truth's own noise sets. Slope and coverage need a score with
a unit and an error; the peers' have neither, so for them the mean Pearson correlation is all that can be said of scale.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import finfluence as fi
from benchmarks._calibration_problems import Data, digits_data, sample_table
from benchmarks._data import Problem
from benchmarks._methods import Training, directional, train
from benchmarks._peers import NOT_COMPARED, PEERS, missing, run_peer, write_problem
from benchmarks._records import Record, parser
from benchmarks.calibration import single_queries
from benchmarks.peers.common import network
from finfluence.influence import agreement, ceiling

OPTIMIZERS: dict[str, Any] = {"SGD": fi.SGD(lr=0.05), "AdamW": fi.AdamW(lr=0.002)}
NETWORK = "mlp-64-32-10-tanh"
COLUMNS = {
    "method": "method",
    "spearman": "rank agreement|.2f",
    "pearson": "Pearson|.2f",
    "slope": "slope, true on estimated|.2f",
    "coverage": "95 % coverage|.0%",
    "trainings": "trainings",
    "settings": "settings",
}
# No score of single queries, or the formula of another peer in the table with the same numbers.
LEFT_OUT = ("pydvl Data-Banzhaf (logistic)", "cleanlab", "pydvl influence")


def truth_of(data: Data, optimizer: Any, epochs: int, runs: int, folder: Path) -> fi.Truth:
    return fi.retrain(
        fi.ClassificationTask(),
        lambda seed: network(NETWORK, seed=seed),
        data.dataset,
        data.queries,
        subsets=data.subsets,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=20,
        runs=runs,
        initialisation="fixed",
        executor="ensemble",
        directory=folder,
    )


def record(data: Data, optimizer: Any, epochs: int, *, seed: int, signals: Any, folder: Path) -> fi.Run:
    return fi.train(
        fi.ClassificationTask(),
        network(NETWORK, seed=0),
        data.dataset,
        queries=data.queries,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=20,
        seed=seed,
        sensitivity="both" if signals == "batch" else "replay",
        signals=signals,
        panel=fi.NoisePanel(64, 5),
        samples=sample_table(data),
        directory=folder,
        show_progress="never",
    )


def problem_of(data: Data, optimizer: Any, epochs: int) -> Problem:
    x, y = (tensor.numpy() for tensor in data.dataset.tensors)
    names = single_queries(data)
    queries = tuple(torch.cat([data.queries[name][k] for name in names]).numpy() for k in (0, 1))
    return Problem(
        "digits, MLP", (x, y), (queries[0], queries[1]), data.planted, NETWORK, optimizer=optimizer, epochs=epochs
    )


def subset_sums(scores: np.ndarray, data: Data) -> np.ndarray:
    """(k, n) scores of samples → (k, m) scores of subsets."""
    return np.stack([scores[:, members].sum(axis=1) for members in data.subsets.values()], axis=1)


def gradient_dots(training: Training) -> np.ndarray:
    """(k, n) inner products of gradients, mean over checkpoints: the baseline that needs no library."""
    problem = training.problem
    x, y = (torch.from_numpy(part) for part in problem.train)
    qx, qy = (torch.from_numpy(part) for part in problem.validation)
    model = network(problem.network)
    total = np.zeros((len(qy), len(y)))
    for state in training.checkpoints:
        model.load_state_dict(state)
        for k in range(len(qy)):
            loss = torch.nn.functional.cross_entropy(model(qx[k : k + 1]), qy[k : k + 1])
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            direction = dict(zip(dict(model.named_parameters()), gradient, strict=True))
            total[k] += directional(model, (x, y), direction)[0]
    return total / len(training.checkpoints)


def pearson(estimated: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(estimated, truth, strict=True)]))


Estimate = tuple[np.ndarray, np.ndarray | None]


def row(method: str, estimates: list[Estimate], truth: Any, top: Any, settings: str = "") -> dict[str, Any]:
    """Means over trainings; slope and coverage where the method has a unit and an error."""
    mu, se = truth
    found = [agreement(a, mu, ceiling=top, estimated_se=b, truth_se=se, resamples=300) for a, b in estimates]
    made: dict[str, Any] = {"method": method, "trainings": len(estimates), "settings": settings}
    made["spearman"] = [
        float(np.mean([f.spearman for f in found])),
        *(float(np.mean([f.spearman_interval[k] for f in found])) for k in (0, 1)),
    ]
    made["pearson"] = float(np.mean([pearson(a, mu) for a, _ in estimates]))
    if estimates[0][1] is not None:
        made["slope"] = [
            float(np.mean([f.slope for f in found])),
            *(float(np.mean([f.slope_interval[k] for f in found])) for k in (0, 1)),
        ]
        made["coverage"] = float(np.mean([f.coverage for f in found]))
    return made


def own_rows(data: Data, optimizer: Any, epochs: int, *, seeds: int, truth: Any, top: Any) -> list[dict[str, Any]]:
    """finfluence: single runs (live, replay, full signals) and runs pooled."""
    names = single_queries(data)

    def stack(frames: list[Any], errors: Any) -> Estimate:
        return np.array([f["mu"].to_numpy() for f in frames]), np.array([errors(f) for f in frames])

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept = {
            signals: [
                record(data, optimizer, epochs, seed=s, signals=signals, folder=Path(folder) / f"{signals}{s}")
                for s in range(1, seeds + 1)
            ]
            for signals in ("batch", "full")
        }
        singles: tuple[tuple[str, str, Any], ...] = (
            ("finfluence, live", "batch", "live"),
            ("finfluence, replay", "batch", "run"),
            ("finfluence, replay, full signals", "full", "run"),
        )
        for method, signals, sensitivity in singles:
            estimates = [
                stack(
                    [run.influence(q, subsets=data.subsets, sensitivity=sensitivity) for q in names],
                    lambda f: f["se"].to_numpy(),
                )
                for run in kept[signals]
            ]
            rows.append(row(method, estimates, truth, top))
        if seeds > 1:
            frames = [fi.pool(kept["full"], q, subsets=data.subsets) for q in names]
            half = stack(frames, lambda f: (f["ci_high"] - f["ci_low"]).to_numpy() / 2 / 1.959964)
            rows.append(row(f"finfluence, replay, full signals, {seeds} runs pooled", [half], truth, top))
    return rows


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--peers", type=Path, default=None, help="folder of the peers' environments")
    options_parser.add_argument("--runs", type=int, default=128, help="retrainings an arm")
    options_parser.add_argument("--seeds", type=int, default=2, help="recorded runs")
    options_parser.add_argument("--peer-seeds", type=int, default=1, help="trainings that peers score")
    options_parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    options_parser.add_argument("--epochs", type=int, nargs="*", default=[1, 3, 20])
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.runs, options.seeds, options.epochs, options.optimizers = 8, 1, [1], ["SGD"]
    data = digits_data()
    made = Record("agreement", options, seeds=f"recorded runs 1 to {options.seeds}; retraining's own", merge=True)
    failures: dict[str, str] = {}
    for name in options.optimizers:
        for epochs in options.epochs:
            optimizer = OPTIMIZERS[name]
            with tempfile.TemporaryDirectory() as folder:
                found = truth_of(data, optimizer, epochs, options.runs, Path(folder))
            names = single_queries(data)
            truth, top = found.matrix(names), ceiling(*found.split_halves(names))
            rows = own_rows(data, optimizer, epochs, seeds=options.seeds, truth=truth, top=top)
            rows += peer_rows(data, optimizer, epochs, options=options, truth=truth, top=top, failures=failures)
            stem = f"{name}, {epochs} epoch{'s' if epochs > 1 else ''}"
            title = f"{stem}: ceiling {top.correlation:.2f}, {options.runs} retrainings an arm"
            earlier = [t for t in made.content["tables"] if t["title"].split(":")[0] == stem]
            made.content["tables"] = [t for t in made.content["tables"] if t not in earlier]
            if not options.peers:  # retraining is the same with the same number of runs, so peers' figures stay
                remade = {r["method"] for r in rows}
                rows += [r for t in earlier if t["title"] == title for r in t["rows"] if r["method"] not in remade]
            made.table(title, COLUMNS, sorted(rows, key=lambda r: -r["spearman"][0]))
    for peer, reason in (failures | NOT_COMPARED).items():
        made.note(f"{peer}: {reason}.")
    if options.peers and (absent := missing(options.peers)):
        made.note(f"Without an environment and so left out: {', '.join(absent)}.")


def peer_rows(
    data: Data, optimizer: Any, epochs: int, *, options: Any, truth: Any, top: Any, failures: dict[str, str]
) -> list[dict[str, Any]]:
    """The baseline and every peer, on the checkpoints of the same trainings."""
    problem = problem_of(data, optimizer, epochs)
    found: dict[str, list[Estimate]] = {}
    settings: dict[str, str] = {}
    for seed in range(1, (options.peer_seeds if options.peers else options.seeds) + 1):
        training = train(problem, seed=seed, start=0)
        dots = subset_sums(gradient_dots(training), data)
        found.setdefault("gradient dot, mean over checkpoints", []).append((dots, None))
        if not options.peers:
            continue
        others = range(1000 * seed, 1000 * seed + 10)
        ensemble = [train(problem, seed=s, start=0, most=1).checkpoints[-1] for s in others]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "problem.npz"
            write_problem(path, training, problem.validation, ensemble=ensemble)
            for peer in PEERS:
                if peer.name in LEFT_OUT or peer.name in failures:
                    continue
                result = run_peer(peer, path, folder=options.peers)
                if isinstance(result, str) or result.scores is None:
                    failures[peer.name] = result if isinstance(result, str) else "no scores of single queries"
                    continue
                found.setdefault(peer.name, []).append((subset_sums(result.scores, data), None))
                settings[peer.name] = f"{result.about['version']}; {result.about['settings']}"
    return [row(method, estimates, truth, top, settings.get(method, "")) for method, estimates in found.items()]


if __name__ == "__main__":
    main()
