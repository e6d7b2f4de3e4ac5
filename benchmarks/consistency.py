"""Do other seeds give the same answer, and is it right? Sets of the most suspect samples over reruns of one training.

    python -m benchmarks consistency --data DATA/mnist DATA/fashion-mnist --peers PEERS

10 % of the labels are wrong (uniform flips). Networks are trained at a constant rate, or, "rate to 0", with one that
falls linearly to zero; the query is the loss of --validation samples. Every training is repeated with other batch
orders ("shuffling"), and with other batch orders and initial parameters ("shuffling + initialisation"). Each method
scores every sample in every run; the table has the mean pairwise Jaccard similarity of the top 1, 5 and 10 % and of
what the method flags, with jackknife intervals over runs, and the joint figure: the share of the wrong labels that
*every* run puts in its top 10 %, or flags. "5 runs averaged" compares disjoint groups of five runs with each other.
With --measured, one table compares the end of training with the mean of what is measured after each epoch of its
second half, and nothing else is run. Two uses are kept apart: influence on the validation loss ("query"), and what a
sample does to itself ("self").

Published, of the most influential samples on MNIST with an MLP over reruns (f-INE, arXiv 2510.10510): f-INE 0.938,
TRAK 0.736, influence functions 0.567, TracIn 0.564.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import finfluence as fi
from benchmarks._data import NOISES, Problem, clean_problem, named_by_query, sources, with_noise
from benchmarks._methods import (
    QUERY,
    Scores,
    Training,
    baselines,
    harmful,
    of_second_half,
    own_scores,
    record,
    standing_out,
    train,
)
from benchmarks._peers import PEERS, missing, peer_scores
from benchmarks._records import Record, parser
from finfluence.influence import detection
from finfluence.influence.consistency import (
    joint_recall,
    mean_over_pairs,
    pairwise_jaccard,
    pairwise_spearman,
    top_sets,
)

Method = tuple[str, str]
# The same formula as another peer's in the table, or a value of another model: their scores are in `agreement`.
LEFT_OUT = (
    "dattri TracIn",
    "dattri TRAK",
    "dattri-llm TracIn",
    "pydvl influence",
    "pydvl Data-Banzhaf (logistic)",
    "traker TRAK, 1 model",
)
POOLS = 3  # groups of five runs that are averaged and compared with each other
VALIDATION = 1000  # samples of the query
RANDOMNESS = ("shuffling", "shuffling + initialisation")
COLUMNS = {
    "data": "data, network",
    "randomness": "randomness",
    "use": "use",
    "method": "method",
    "jaccard_1": "top 1 %|.3f",
    "jaccard_5": "top 5 %|.3f",
    "jaccard_10": "top 10 %|.3f",
    "jaccard_flagged": "flagged|.3f",
    "flagged": "flagged, mean|.0f",
    "spearman": "rank correlation|.3f",
    "joint_10": "joint, top 10 %|.3f",
    "joint_flagged": "joint, flagged|.3f",
}

MEASURED = "What is measured: the end of training, or the mean over the second half of its epochs (10 % wrong labels)"
MEASURED_COLUMNS = {
    "data": "data, network",
    "signals": "signals or baseline",
    "measured": "measured",
    "jaccard_1": "top 1 %|.3f",
    "jaccard_5": "top 5 %|.3f",
    "jaccard_10": "top 10 %|.3f",
    "spearman": "rank correlation|.3f",
    "joint_10": "joint, top 10 %|.3f",
    "auroc": "AUROC|.3f",
    "average_precision": "average precision|.3f",
    "flagged": "flagged, mean|.0f",
}


def start_of(randomness: str, run: int) -> int:
    """Seed of the initial parameters of a run."""
    return 0 if randomness == "shuffling" else run


def collect(problem: Problem, randomness: str, *, runs: int, pools: int, peers: Path | None, only: Any) -> Any:
    """Scores of every run, by method; and of groups of five runs averaged, where `pools` is not 0."""
    found: dict[Method, list[Scores]] = defaultdict(list)
    grouped: dict[Method, list[Scores]] = defaultdict(list)
    failures: dict[str, str] = {}
    for group in range(max(pools, 1)):
        size = 5 if pools else runs
        members: dict[Method, list[Scores]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, list[fi.Run]] = {"batch": [], "full": []}
            for run in range(group * size, (group + 1) * size):
                start = start_of(randomness, run)
                training = train(problem, seed=run + 1, start=start)
                for signals, recorded in kept.items():
                    place = Path(folder) / f"{signals}-{run}"
                    recorded.append(record(problem, place, seed=run + 1, start=start, signals=signals))
                scores = own_scores(kept["batch"][-1], kept["full"][-1]) | baselines(training)
                if peers:
                    scores |= peers_of(training, randomness, run, peers=peers, only=only, failures=failures)
                for method, score in scores.items():
                    members[method].append(score)
                    if run < runs:
                        found[method].append(score)
            if pools:
                for method, scores_of in members.items():
                    if len(scores_of) == size and "finfluence" not in method[1]:
                        grouped[method].append(Scores(np.mean([s.value for s in scores_of], axis=0)))
                for method, signals, query in (
                    (("query", "finfluence, replay"), "batch", QUERY),
                    (("query", "finfluence, replay, full signals"), "full", QUERY),
                    (("self", "finfluence, self-influence (live)"), "batch", "self"),
                ):
                    frame = fi.pool(kept[signals], query, alternative="supporting" if query == "self" else "harmful")
                    grouped[method].append(standing_out(frame) if query == "self" else harmful(frame))
    return found, grouped, failures


def peers_of(
    training: Training, randomness: str, run: int, *, peers: Path, only: Any, failures: dict[str, str]
) -> dict[Method, Scores]:
    """Every peer's scores of one training; TRAK's ten models have seeds of their own in every run."""
    others = range(1000 + 10 * run, 1010 + 10 * run)
    ensemble = [
        train(training.problem, seed=s, start=start_of(randomness, s), most=1).checkpoints[-1] for s in others
    ]  # as many as its documentation's example has
    skip = {*LEFT_OUT, *(p.name for p in PEERS if only and p.environment not in only)}
    return peer_scores(training, ensemble=ensemble, peers=peers, skip=skip, failures=failures)


def twice(problem: Problem, folder: Path, *, run: int, signals: str) -> dict[str, fi.Run]:
    """One recorded run, asked about the end of training and about its second half."""
    recorded = record(problem, folder / f"{signals}-{run}", seed=run + 1, start=0, signals=signals)
    # the second replay takes the place of the first
    end = fi.open_run(shutil.copytree(recorded.directory, folder / f"{signals}-{run}-end"))
    return {"the end": end, "second half": of_second_half(problem, recorded, start=0)}


def measured(problem: Problem, *, runs: int, pools: int) -> list[dict[str, Any]]:
    """finfluence's figures for what is measured at the end, and as a mean over the second half of the epochs.

    Of `runs` runs, and of `pools` groups of five runs averaged (full signals).
    """
    found: dict[tuple[str, str], list[Scores]] = defaultdict(list)

    def add(what: str, signals: str, asked: Any) -> None:
        found[what, signals].append(harmful(asked.influence(QUERY, alternative="harmful")))

    for first in range(0, max(runs, 5 * pools), 5):
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, list[fi.Run]] = defaultdict(list)
            for run in range(first, min(first + 5, max(runs, 5 * pools))):
                for signals in ("batch", "full") if run < runs else ("full",):
                    for what, asked in twice(problem, Path(folder), run=run, signals=signals).items():
                        if run < runs:
                            add(what, signals, asked)
                        if signals == "full":
                            kept[what].append(asked)
            if first < 5 * pools:
                for what, members in kept.items():
                    add(what, "full, 5 runs averaged", fi.PooledRuns(members))
    return _measured_rows(problem, found)


def measured_losses(problem: Problem, *, runs: int, pools: int) -> list[dict[str, Any]]:
    """The losses' figures for the same runs: the most consistent of what costs nothing."""
    found: dict[tuple[str, str], list[Scores]] = defaultdict(list)
    losses: dict[str, list[np.ndarray]] = defaultdict(list)
    for run in range(max(runs, 5 * pools)):
        for (use, name), scores in baselines(train(problem, seed=run + 1, start=0)).items():
            if use == "self":
                losses[name.removeprefix("loss, ")].append(scores.value)
    for what, values in losses.items():
        found[what, "loss"] = [Scores(value) for value in values[:runs]]
        groups = [values[5 * k : 5 * k + 5] for k in range(pools)]
        if groups:
            found[what, "loss, 5 runs averaged"] = [Scores(np.mean(group, axis=0)) for group in groups]
    return _measured_rows(problem, found)


def _measured_rows(problem: Problem, found: dict[tuple[str, str], list[Scores]]) -> list[dict[str, Any]]:
    rows = []
    for (what, signals), scores in found.items():
        precision = [detection(s.value, problem.planted) for s in scores]
        rows.append(
            {"data": problem.name, "measured": what, "signals": signals}
            | row(scores, problem.planted)
            | {
                "auroc": float(np.mean([d.auroc for d in precision])),
                "average_precision": float(np.mean([d.average_precision for d in precision])),
            }
        )
    return rows


def row(scores: list[Scores], planted: np.ndarray) -> dict[str, Any]:
    """The figures of one method over its runs."""
    value = np.array([s.value for s in scores])
    made: dict[str, Any] = {"runs": len(scores)}

    def figure(found: Any) -> list[float]:
        return [found.value, found.low, found.high]

    for percent in (1, 5, 10):
        made[f"jaccard_{percent}"] = figure(mean_over_pairs(pairwise_jaccard(top_sets(value, percent / 100))))
    made["spearman"] = figure(mean_over_pairs(pairwise_spearman(value), bounds=(-1, 1)))
    made["joint_10"] = figure(joint_recall(top_sets(value, 0.1), planted))
    flags = [s.flagged for s in scores if s.flagged is not None]
    if len(flags) == len(scores):
        flagged = np.array(flags)
        made["jaccard_flagged"] = figure(mean_over_pairs(pairwise_jaccard(flagged)))
        made["joint_flagged"] = figure(joint_recall(flagged, planted))
        made["flagged"] = float(flagged.sum(axis=1).mean())
    return made


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders with IDX files")
    options_parser.add_argument("--peers", type=Path, default=None, help="folder of the peers' environments")
    options_parser.add_argument("--only", nargs="*", default=None, help="environments of the peers to run")
    options_parser.add_argument("--samples", type=int, default=1000, help="training samples of an IDX data set")
    options_parser.add_argument("--validation", type=int, default=VALIDATION, help="samples of the validation query")
    options_parser.add_argument("--runs", type=int, default=5, help="runs that are compared")
    options_parser.add_argument(
        "--peer-problems", nargs="*", default=["digits, MLP"], help="where peers run too, under shuffling"
    )
    options_parser.add_argument("--problems", nargs="*", default=None, help='for example "digits, MLP"')
    options_parser.add_argument("--measured", action="store_true", help="the end against the mean of the second half")
    options_parser.add_argument("--noise", choices=NOISES, default="uniform", help="kind of the 10 %% of bad rows")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = 3 if options.quick else options.runs
    record_ = Record("consistency", options, seeds=f"batch orders 1 to {runs} (pools: 1 to 15); flips 0", merge=True)
    data = sources(options.data, samples=options.samples)
    failures: dict[str, str] = {}
    means: list[dict[str, Any]] = []
    for name, pair in data.items():
        for model, settling in ((m, s) for s in (False, True) for m in ("mlp", "cnn")):
            if options.quick and (model == "cnn" or settling):
                continue
            clean = clean_problem(
                name, pair, model=model, quick=options.quick, settling=settling, validation=options.validation
            )
            problem = with_noise(clean, options.noise, 0.1, seed=0)
            if options.problems and problem.name not in options.problems:
                continue
            with_peers = options.peers if problem.name in options.peer_problems else None
            problem = named_by_query(problem, options.validation, usual=VALIDATION)
            if options.measured:
                pools = 0 if options.quick else POOLS
                means += measured(problem, runs=runs, pools=pools)
                means += measured_losses(problem, runs=runs, pools=pools)
                record_.table(MEASURED, MEASURED_COLUMNS, means, part="data")
                continue
            averaged = name in ("digits", "mnist") and model == "mlp" and not (options.quick or settling)
            rows: list[dict[str, Any]] = []
            for randomness in RANDOMNESS:
                found, grouped, failed = collect(
                    problem,
                    randomness,
                    runs=runs,
                    pools=POOLS if averaged and randomness == RANDOMNESS[0] else 0,
                    peers=with_peers if randomness == RANDOMNESS[0] else None,
                    only=options.only,
                )
                failures |= failed
                shared = {"data": problem.name, "randomness": randomness}
                for (use, method), scores in sorted(found.items()):
                    if len(scores) == runs:
                        rows.append(shared | {"use": use, "method": method} | row(scores, problem.planted))
                for (use, method), scores in sorted(grouped.items()):
                    if len(scores) < POOLS:
                        continue
                    shown = {"use": use, "method": f"{method}, 5 runs averaged"}
                    rows.append(shared | shown | row(scores, problem.planted))
            n = len(problem.planted)
            bad = "wrong labels" if options.noise == "uniform" else f"{options.noise} bad rows"
            named = problem.name if options.noise == "uniform" else f"{problem.name}, {options.noise}"
            title = f"{named}: {n} samples, {problem.epochs} epochs, {int(problem.planted.sum())} {bad}"
            # with --only, the other peers' rows stay
            record_.table(title, COLUMNS, rows, part="method" if options.only else None)
    for peer, reason in failures.items():
        record_.note(f"{peer}: {reason}.")
    if options.peers and (absent := missing(options.peers)):
        record_.note(f"Without an environment and so left out: {', '.join(absent)}.")


if __name__ == "__main__":
    main()
