"""Finding bad rows: wrong labels, and bad rows that the loss does not give away; beside every peer and two baselines.

    python -m benchmarks mislabel --peers PEERS
    python -m benchmarks mislabel --data DATA/fashion-mnist --problems "fashion-mnist, CNN"

Ranks all training rows by a score and looks where the planted ones are: AUROC, average precision, and recall after
inspecting 10, 20 and 40 % of the rows; mean and standard deviation over seeds (of the planting and of the training).
Two uses are kept apart: "self", what a sample's own training says about it (self-influence, its loss), and "query",
influence on the mean validation loss, or on the planted behaviour where one was planted. With --measured, one table
compares the end of training with the mean over the second half of its epochs, and nothing else is run. The kinds of
bad rows:

- uniform, class-conditional: wrong labels, 10, 20 and 40 %;
- near-class: the most confusable rows take the label that they are easily confused with;
- duplicated: every wrong sample is there ten times, so that the network fits it;
- shifted: half of two classes pulled half way towards another class, labels kept;
- backdoor: a bright corner and the label 0; the query is triggered validation images with their true labels.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._data import Problem, clean_problem, named_by_query, sources, with_noise
from benchmarks._methods import QUERY, Scores, baselines, harmful, of_second_half, own_scores, recorded, train
from benchmarks._peers import NOT_COMPARED, PEERS, missing, peer_scores
from benchmarks._records import Record, parser
from finfluence.influence import detection

CASES = (
    ("uniform", 0.1),
    ("uniform", 0.2),
    ("uniform", 0.4),
    ("class-conditional", 0.1),
    ("class-conditional", 0.2),
    ("class-conditional", 0.4),
    ("near-class", 0.1),
    ("duplicated", 0.1),
    ("shifted", 0.1),
    ("backdoor", 0.05),
)
VALIDATION = 200  # samples of the query
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
COLUMNS = {
    "use": "use",
    "method": "method",
    "auroc": "AUROC|.3f",
    "auroc_sd": "sd|.3f",
    "ap": "average precision|.3f",
    "ap_sd": "sd|.3f",
    "recall_10": "recall at 10 %|.2f",
    "recall_20": "at 20 %|.2f",
    "recall_40": "at 40 %|.2f",
    "precision_flagged": "precision of flagged|.2f",
    "recall_flagged": "recall of flagged|.2f",
    "seeds": "seeds",
}
# the same formula as another peer's in the table
LEFT_OUT = ("dattri TracIn", "dattri TRAK", "dattri-llm TracIn", "pydvl influence", "traker TRAK, 1 model")

# minutes a case, for the values of another model
FIRST_CASE_ONLY = ("pydvl Data-Banzhaf (logistic)",)


def measured(score: Scores, planted: np.ndarray) -> dict[str, Any]:
    found = detection(score.value, planted)
    order = np.argsort(-score.value, kind="stable")
    cumulative = np.cumsum(planted[order]) / planted.sum()
    made: dict[str, Any] = {"auroc": found.auroc, "ap": found.average_precision}
    made["curve"] = [float(cumulative[max(1, round(f * len(planted))) - 1]) for f in FRACTIONS]
    if score.flagged is not None and score.flagged.any():
        made["precision_flagged"] = float(planted[score.flagged].mean())
        made["recall_flagged"] = float(score.flagged[planted].mean())
    return made


def summary(use: str, method: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    made: dict[str, Any] = {"use": use, "method": method, "seeds": len(found)}
    for key in ("auroc", "ap"):
        values = [f[key] for f in found]
        made[key] = float(np.mean(values))
        made[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    made["curve"] = np.mean([f["curve"] for f in found], axis=0).tolist()
    made["fractions"] = list(FRACTIONS)
    for percent in (10, 20, 40):
        made[f"recall_{percent}"] = made["curve"][FRACTIONS.index(percent / 100)]
    for key in ("precision_flagged", "recall_flagged"):
        values = [f[key] for f in found if key in f]
        made[key] = float(np.mean(values)) if values else None
    return made


def scores_of(
    problem: Problem, seed: int, *, peers: Path | None, skip: tuple[str, ...], failures: dict[str, str]
) -> dict[Any, Scores]:
    training = train(problem, seed=seed, start=seed)
    with (
        recorded(problem, seed=seed, start=seed) as batch,
        recorded(problem, seed=seed, start=seed, signals="full") as full,
    ):
        scores = own_scores(batch, full) | baselines(training)
    if peers is None:
        return scores
    ensemble = [train(problem, seed=s, start=s, most=1).checkpoints[-1] for s in range(100 * seed, 100 * seed + 10)]
    return scores | peer_scores(training, ensemble=ensemble, peers=peers, skip=skip, failures=failures)


def compare_measured(made: Record, clean: Problem, *, seeds: int, noises: list[str]) -> None:
    """Adds finfluence's figures for what is measured at the end, and as a mean over the second half of the epochs."""
    rows = []
    for kind, share in CASES:
        if kind not in noises:
            continue
        found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for seed in range(1, seeds + 1):
            problem = with_noise(clean, kind, share, seed=seed)
            for signals in ("batch", "full"):
                with recorded(problem, seed=seed, start=seed, signals=signals) as run:
                    end = harmful(run.influence(QUERY, alternative="harmful"))
                    again = of_second_half(problem, run, start=seed).influence(QUERY, alternative="harmful")
                found["the end", signals].append(measured(end, problem.planted))
                found["second half", signals].append(measured(harmful(again), problem.planted))
        rows += [
            {"bad": f"{kind} {share:.0%}", "measured": what} | summary("query", signals, results)
            for (what, signals), results in found.items()
        ]
        columns = {"bad": "bad rows", "measured": "measured"} | COLUMNS | {"method": "signals"}
        made.table(f"{clean.name}: the end, or the mean over the second half of the epochs", columns, rows)


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders with IDX files")
    options_parser.add_argument("--peers", type=Path, default=None, help="folder of the peers' environments")
    options_parser.add_argument("--only", nargs="*", default=None, help="environments of the peers to run")
    options_parser.add_argument("--peer-seeds", type=int, default=1, help="seeds on which peers run too")
    options_parser.add_argument("--samples", type=int, default=1000, help="training samples of an IDX data set")
    options_parser.add_argument("--validation", type=int, default=VALIDATION, help="samples of the validation query")
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--problems", nargs="*", default=["digits, MLP"], help='for example "digits, CNN"')
    options_parser.add_argument("--measured", action="store_true", help="the end against the mean of the second half")
    options_parser.add_argument("--noises", nargs="*", default=sorted({kind for kind, _ in CASES}))
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.noises = 1, ["near-class"]
    made = Record("mislabel", options, seeds=f"1 to {options.seeds}", merge=True)
    failures: dict[str, str] = {}
    for name, pair in sources(options.data, samples=options.samples).items():
        for model in ("mlp", "cnn"):
            clean = clean_problem(name, pair, model=model, quick=options.quick, validation=options.validation)
            if clean.name not in options.problems:
                continue
            clean = named_by_query(clean, options.validation, usual=VALIDATION)
            if options.measured:
                compare_measured(made, clean, seeds=options.seeds, noises=options.noises)
                continue
            for kind, share in CASES:
                if kind not in options.noises:
                    continue
                found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
                for seed in range(1, options.seeds + 1):
                    problem = with_noise(clean, kind, share, seed=seed)
                    peers = options.peers if seed <= options.peer_seeds else None
                    skip = LEFT_OUT if (kind, share) == CASES[0] else (*LEFT_OUT, *FIRST_CASE_ONLY)
                    skip += tuple(p.name for p in PEERS if options.only and p.environment not in options.only)
                    for key, score in scores_of(problem, seed, peers=peers, skip=skip, failures=failures).items():
                        found[key].append(measured(score, problem.planted))
                rows = [summary(use, method, results) for (use, method), results in found.items()]
                rows.sort(key=lambda r: (r["use"], -r["ap"]))
                made.table(f"{clean.name}, {kind} {share:.0%}", COLUMNS, rows)
    if options.measured:
        return
    for peer, reason in (failures | NOT_COMPARED).items():
        made.note(f"{peer}: {reason}.")
    if options.peers and (absent := missing(options.peers)):
        made.note(f"Without an environment and so left out: {', '.join(absent)}.")


if __name__ == "__main__":
    main()
