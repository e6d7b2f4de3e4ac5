"""Is μ true in a language model? Groups of instruction rows, against fine-tuning again without them.

    python -m benchmarks poison_truth --scratch SCRATCH   # 535 rows, two entities; hours on two cores
    python -m benchmarks poison_truth --quick             # a smoke test: 90 rows, one entity

The trainings of `benchmarks poison`, whose groups are the kinds of rows that its generator writes, half of the planted
rows, and random ones. Truth is the retraining oracle's: every arm trains as many steps as all rows do, from the same
adapters, in pairs of one batch order. Queries are the mean loss of ten negative, ten neutral and ten reference
answers, the contrast of the first with the others, and two of the negative answers by themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import finfluence as fi
from benchmarks._records import Record, parser
from benchmarks.poison.data import ENTITIES, SIZES, Problem, make_problem
from benchmarks.poison.experiment import QUERIES, Settings, Unit
from benchmarks.poison.model import AdaptedModel, Adapters, convert_model, default_cache
from benchmarks.poison.task import collate
from finfluence.errors import FinfluenceError
from finfluence.influence import agreement, ceiling
from finfluence.runs.oracle import Processes

SMALL, LARGE = 0.03, 0.15  # shares of the rows between which a kind is a group: without "corpus" it is another training
SINGLE = 2  # answers that are asked about by themselves
RANDOM, SHARE = 4, 0.05  # random groups, and the share of the rows in each
ADAPTERS = 1  # seed of the adapters, the same in every training
Z = 1.959964  # half the width of a 95 % interval, in standard errors
FDR = 0.05
Row = dict[str, Any]

AGREEMENT = {
    "problem": "entity",
    "runs": "estimates",
    "spearman": "Spearman|.3f",
    "ceiling": "ceiling|.3f",
    "slope": "slope, true on estimated|.2f",
    "coverage": "95 % coverage|.0%",
    "width": "half an interval|.2f",
    "queries": "queries",
    "groups": "groups",
    "retrainings": "retrainings an arm",
    "orders": "batch orders",
}
CERTAIN = {
    "problem": "entity",
    "runs": "estimates",
    "query": "query",
    "flagged": "significant rows|.0f",
    "found": "planted among them|.1f",
    "lowest": "lowest of the runs",
    "planted": "planted",
}
GROUPS = {"problem": "entity", "query": "query", "group": "group", "rows": "rows"}
MEASURED = {"measured": "retrained: μ|.1f"}


class Start:
    """`make_model` of the oracle: the adapted layers at their start. Picklable; a process loads the model once."""

    def __init__(self, path: Path, adapters: Adapters) -> None:
        self.path, self.adapters = path, adapters

    def __call__(self, seed: int) -> nn.Module:
        return _adapted(self.path, self.adapters).reset()


@lru_cache(maxsize=1)
def _adapted(path: Path, adapters: Adapters) -> AdaptedModel:
    return AdaptedModel(path, adapters, seed=ADAPTERS)


class Comparison:
    """Recorded runs and retrainings of one problem.

    Args:
        problem: rows and queries.
        settings: of the training.
        folder: where the trainings are kept.
    """

    def __init__(self, problem: Problem, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.path = settings, folder, convert_model(default_cache())
        self.unit = Unit(problem, settings, seed=ADAPTERS, model_path=self.path, folder=folder, shared=folder)
        self.groups = groups(problem)
        negative = self.unit.queries["negative"]
        single = {f"negative {k}": negative.subset([k]) for k in range(SINGLE)}
        self.queries = self.unit.queries | single
        plan = self.unit.plan()
        self._training: dict[str, Any] = {
            "optimizer": plan.optimizer,
            "schedule": plan.schedule,
            "epochs": plan.epochs,
            "batch_size": plan.batch_size,
            "collate": collate,
        }

    def recorded(self, seed: int) -> fi.Run:
        """One training in the order of `seed`, recorded and replayed."""
        return fi.train(
            self.unit.task,
            self.unit.adapted.reset(),
            self.unit.rows,
            queries=self.queries,
            seed=seed,
            sensitivity="replay",
            signals="full",
            panel=fi.NoisePanel(len(self.unit.rows), self.settings.positions),
            directory=self.folder / f"run-{seed}",
            exist="resume",
            **self._training,
        )

    def left_out(self, run: fi.Run) -> np.ndarray:
        """(3, q, s) μ and the ends of its interval: the run's steps again, without each group."""
        frame = fi.leave_out(
            run.directory,
            self.unit.task,
            self.unit.adapted.reset(),
            dataset=self.unit.rows,
            queries=self.queries,
            subsets=self.groups,
            collate=collate,
        )
        rows = [frame.filter(query=query) for query in self.queries]
        return np.array([[row[key].to_numpy() for row in rows] for key in ("mu", "ci_low", "ci_high")])

    def truth(self, runs: int, workers: int) -> fi.Truth:
        """`runs` trainings with all rows and without each group."""
        return fi.retrain(
            self.unit.task,
            Start(self.path, self.settings.adapters),
            self.unit.rows,
            self.queries,
            subsets=self.groups,
            runs=runs,
            executor=Processes(workers),
            directory=self.folder / "truth",
            **self._training,
        )


def groups(problem: Problem) -> dict[str, list[int]]:
    """Rows of each group by its name: kinds of rows, half of the planted ones, random ones."""
    kinds = np.array([row.kind for row in problem.rows])
    rng = np.random.default_rng(0)
    shares = {str(kind): float((kinds == kind).mean()) for kind in np.unique(kinds)}
    found = {kind: np.flatnonzero(kinds == kind) for kind, share in shares.items() if SMALL <= share <= LARGE}
    found["half of the planted"] = rng.choice(found["planted"], len(found["planted"]) // 2, replace=False)
    for number in range(1, RANDOM + 1):
        found[f"random {number}"] = rng.choice(len(kinds), round(SHARE * len(kinds)), replace=False)
    return {name: sorted(rows.tolist()) for name, rows in found.items()}


def estimates(run: fi.Run | fi.PooledRuns, queries: Sequence[str], subsets: dict[str, list[int]]) -> np.ndarray:
    """(3, q, s) μ and the ends of its interval, of every query on every subset."""
    frames = [run.influence(query, subsets=subsets) for query in queries]
    return np.array([[frame[key].to_numpy() for frame in frames] for key in ("mu", "ci_low", "ci_high")])


def agreements(problem: str, truth: fi.Truth, found: dict[str, list[np.ndarray]], queries: list[str]) -> list[Row]:
    """How well each kind of estimate agrees with the truth, means over its runs."""
    measured, error = truth.matrix(queries)
    top = ceiling(*truth.split_halves(queries))
    rows = []
    for kind, estimated in found.items():
        each = [
            agreement(mu, measured, ceiling=top, estimated_se=(high - low) / 2 / Z, truth_se=error)
            for mu, low, high in estimated
        ]
        rows.append(
            {
                "problem": problem,
                "runs": kind,
                "spearman": np.mean([a.spearman for a in each]),
                "ceiling": top.correlation,
                "slope": [np.mean([a.slope for a in each]), *np.mean([a.slope_interval for a in each], axis=0)],
                "coverage": np.mean([a.coverage for a in each]),
                "width": np.mean([(high - low) / 2 for _, low, high in estimated]),
                "queries": len(queries),
                "groups": len(measured[0]),
                "retrainings": truth.runs(None),
                "orders": "paired" if truth.paired else "independent",
            }
        )
    return rows


def effects(
    problem: str, truth: fi.Truth, found: dict[str, list[np.ndarray]], subsets: dict[str, list[int]]
) -> list[Row]:
    """Every group's μ on the two queries of `benchmarks poison`: estimated by the first runs of each kind, measured."""
    rows = []
    for query in QUERIES:
        place = truth.queries.index(query)
        measured = truth.influence(query).select("mu", "ci_low", "ci_high").to_numpy()
        for at, (group, members) in enumerate(subsets.items()):
            row: Row = {"problem": problem, "query": query, "group": group, "rows": len(members)}
            row |= {kind: estimated[0][:, place, at].tolist() for kind, estimated in found.items()}
            rows.append(row | {"measured": measured[at].tolist()})
    return rows


def certain(problem: str, planted: np.ndarray, found: Mapping[str, Sequence[fi.Run | fi.PooledRuns]]) -> list[Row]:
    """Single rows that are significant at a false-discovery rate of 5 %, means over the runs of each kind."""
    rows = []
    for kind, runs in found.items():
        for query in QUERIES:
            flags = [run.influence(query, alternative="supporting")["q_value"].to_numpy() <= FDR for run in runs]
            seen = [int(f[planted].sum()) for f in flags]
            row: Row = {"problem": problem, "runs": kind, "query": query, "planted": int(planted.sum())}
            row |= {"flagged": np.mean([f.sum() for f in flags]), "found": np.mean(seen), "lowest": min(seen)}
            rows.append(row)
    return rows


def _compare(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    settings, size = Settings(), "quick" if options.quick else "cpu"
    entities, seeds, runs = options.entities, options.seeds, options.runs
    if options.quick:
        settings, entities, seeds, runs = replace(settings, refresh=2, positions=2), entities[:1], seeds[:1], 8
    seeded = {"recorded runs": seeds, "adapters": ADAPTERS}
    # one entity at a time takes hours, so a call keeps what an earlier one found of the others
    record = Record("poison_truth", options, seeds=seeded, merge=True)
    agreed: list[Row] = []
    shown: list[Row] = []
    sure: list[Row] = []
    for entity in entities:
        problem = make_problem(entity, SIZES[size])
        compared = Comparison(problem, settings, options.scratch / size / entity)
        if options.quick:
            compared.groups = {name: compared.groups[name] for name in ("planted", "random 1", "random 2")}
        queries = list(compared.queries)
        recorded = [compared.recorded(seed) for seed in seeds]
        kinds: dict[str, list[fi.Run | fi.PooledRuns]] = {"one run": [*recorded]}
        if len(seeds) > 1:
            kinds[f"{len(seeds)} runs as one"] = [fi.PooledRuns(recorded)]
        sure += certain(entity, problem.planted, kinds)
        record.table("Single rows", CERTAIN, sure, part="problem")
        truth = compared.truth(runs, options.processes)
        found = {kind: [estimates(run, queries, compared.groups) for run in of] for kind, of in kinds.items()}
        found["one run, left out"] = [compared.left_out(recorded[0])]
        agreed += agreements(entity, truth, found, queries)
        shown += effects(entity, truth, found, compared.groups)
        record.table("Agreement with retraining", AGREEMENT, agreed, part="problem")
        columns = GROUPS | {kind: f"{kind}: μ|.1f" for kind in found} | MEASURED
        record.table("Groups", columns, shown, part="problem")


def main(arguments: Sequence[str] | None = None) -> None:
    """Records, retrains, compares and writes the record."""
    made = parser(__doc__)
    made.add_argument("--entities", nargs="+", choices=list(ENTITIES), default=list(ENTITIES))
    made.add_argument("--runs", type=int, default=8, help="retrainings an arm")
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="recorded runs, by their batch order")
    made.add_argument("--processes", type=int, default=2, help="retrainings side by side")
    made.add_argument("--scratch", type=Path, default=Path("runs/poison-truth"), help="where trainings are kept")
    options = made.parse_args(arguments)
    try:
        _compare(options)
    except FinfluenceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
