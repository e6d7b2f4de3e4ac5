"""Does cleaning do what was predicted? Cuts of several sizes, predicted from one run and measured by retraining.

    python -m benchmarks cuts

For every recorded run (a seed of its own) the most harmful rows are cut at several sizes. "Shrunk" is what `clean`
predicts, "sum" the sum of the same rows' own estimates: rows that were chosen by their estimates promise too much.
"Elsewhere" is the same sum by another run's estimates, which did not choose the rows; what it overshoots is not
selection but non-linearity. The ratios are of predicted over measured μ, pooled over runs (sum over sum).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import finfluence as fi
from benchmarks._records import Record, parser
from finfluence.workflows import clean
from finfluence.workflows.digits import digits
from finfluence.workflows.recipes import Recipe

QUERY = "validation"
COLUMNS = {
    "cut": "cut",
    "rows": "rows, mean|.0f",
    "planted": "planted among them|.0%",
    "shrunk": "predicted, shrunk|+.1f",
    "sum": "predicted, sum|+.1f",
    "measured": "measured μ|+.1f",
    "error": "its standard error|.1f",
    "shrunk_ratio": "shrunk over measured|.2f",
    "sum_ratio": "sum over measured|.2f",
    "elsewhere_ratio": "elsewhere over measured|.2f",
    "covered": "shrunk interval holds the measured μ|.0%",
    "runs": "runs",
}
# title → (settings of `digits`, sizes of the cuts)
CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "300 digits, 4 epochs, 10 % wrong labels": ({"samples": 300, "epochs": 4}, (6, 15, 30)),
    "300 digits, 4 epochs, clean": ({"samples": 300, "epochs": 4, "flipped": 0.0}, (6, 15, 30)),
    "the demonstration's 1,000 digits, 10 % wrong labels": (
        {"epochs": 12, "batch_size": 50},
        (18, 46, "recommended", "significant"),
    ),
}


def cuts_of(run: fi.Run, sizes: tuple[Any, ...]) -> dict[str, Any]:
    rules: dict[Any, dict[str, Any]] = {size: {"top": size} for size in sizes} | {"significant": {"fdr": 0.05}}
    return {str(size): clean(run, QUERY, **rules[size]) for size in sizes}


def measured(recipe: Recipe, cuts: dict[str, Any], *, runs: int, directory: Path) -> fi.Truth:
    plan = recipe.plan
    return fi.retrain(
        recipe.task,
        lambda seed: recipe.make_model(plan.seed),
        recipe.dataset,
        recipe.queries,
        subsets={name: cut.dropped["sample"].to_numpy() for name, cut in cuts.items()},
        optimizer=plan.optimizer,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        runs=runs,
        initialisation="fixed",
        seed=10_000,
        directory=directory,
        progress=False,
    )


def rows_of(settings: dict[str, Any], sizes: tuple[Any, ...], *, seeds: int, runs: int) -> list[dict[str, Any]]:
    """One row a cut, over recorded runs."""
    recipe = digits(**settings)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        recorded = [
            recipe.train(
                Path(scratch) / f"run-{seed}",
                start=recipe.plan.seed,
                seed=seed,
                sensitivity="replay",
                show_progress="never",
            )
            for seed in range(1, seeds + 1)
        ]
        for number, run in enumerate(recorded):
            cuts = cuts_of(run, sizes)
            truth = measured(recipe, cuts, runs=runs, directory=Path(scratch) / f"truth-{number}").influence(QUERY)
            for name, cut in cuts.items():
                own = truth.row(by_predicate=pl.col("subset") == name, named=True)
                members = cut.dropped["sample"].to_numpy()
                low, high = cut.predicted.interval(0.95)
                found[name].append(
                    {
                        "rows": len(members),
                        "planted": float(cut.dropped["planted"].mean()) if "planted" in cut.dropped.columns else 0.0,
                        "shrunk": cut.predicted.mu,
                        "sum": float(run.influence(QUERY, subsets={"cut": members})["mu"][0]),
                        "elsewhere": float(recorded[number - 1].influence(QUERY, subsets={"cut": members})["mu"][0]),
                        "measured": own["mu"],
                        "error": own["se"],
                        "covered": float(low - 1.96 * own["se"] <= own["mu"] <= high + 1.96 * own["se"]),
                    }
                )
    made = []
    for name, entries in found.items():
        mean = {key: float(np.mean([e[key] for e in entries])) for key in entries[0]}
        ratios = {f"{key}_ratio": mean[key] / mean["measured"] for key in ("shrunk", "sum", "elsewhere")}
        made.append({"cut": name, **mean, **ratios, "runs": len(entries)})
    return made


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--seeds", type=int, default=6, help="recorded runs")
    options_parser.add_argument("--runs", type=int, default=128, help="retrainings an arm")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = CASES
    if options.quick:
        options.seeds, options.runs = 2, 16
        cases = dict(list(CASES.items())[:1])
    record = Record("cuts", options, seeds=f"batch orders 1 to {options.seeds}; retraining's own from 10,000")
    for title, (settings, sizes) in cases.items():
        record.table(title, COLUMNS, rows_of(settings, sizes, seeds=options.seeds, runs=options.runs))


if __name__ == "__main__":
    main()
