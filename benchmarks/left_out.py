"""Subsets left out along the recorded path, one training each, beside first order: both against retraining.

    python -m benchmarks left_out  # nine settings of `calibration`: half an hour on two cores
    python -m benchmarks left_out --settings tanh-sgd-coherent
    python -m benchmarks left_out --quick

The settings, subsets, queries and measures are those of `calibration`; truth are pairs of retrainings. The shift is in
the measurement's own unit: it does not depend on the noise that μ counts in, which removing a kind of samples changes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import finfluence as fi
from benchmarks._calibration_problems import SETTINGS, Data, Setting
from benchmarks._records import Record, parser
from benchmarks.calibration import record, single_queries, truth_of
from benchmarks.pairs import DEFAULT, measurements
from finfluence.influence import Ceiling, agreement, ceiling, metadata

COLUMNS = {
    "note": "setting",
    "rank_first": "Spearman, first order|.3f",
    "rank": "left out|.3f",
    "ceiling": "ceiling|.3f",
    "shift_first": "slope of the shift, true on estimated, first order|.2f",
    "shift": "slope, left out|.2f",
    "slope_first": "slope of μ, first order|.2f",
    "slope": "slope of μ, left out|.2f",
    "coverage_first": "95 % coverage, first order|.0%",
    "coverage": "coverage, left out|.0%",
}


def estimates(setting: Setting, data: Data, run: fi.Run, queries: list[str]) -> dict[str, np.ndarray]:
    """Of every query and subset, (queries, subsets) each: μ, its error and its unit, left out and to first order."""
    left = fi.leave_out(
        run.directory,
        fi.ClassificationTask(),
        setting.make_model(0),
        dataset=data.dataset,
        queries=data.queries,
        subsets=data.subsets,
    )
    first = {query: run.influence(query, subsets=data.subsets) for query in queries}
    f = np.array([len(ids) for ids in data.subsets.values()]) / len(data.dataset)
    found = {
        key: np.array([left.filter(query=query)[key].to_numpy() for query in queries]) for key in ("mu", "se", "unit")
    }
    return found | {
        "mu_first": np.array([frame["mu"].to_numpy() for frame in first.values()]),
        "se_first": np.array([frame["se"].to_numpy() for frame in first.values()]),
        # to first order the noise without a subset is that of smaller batches, see `Removal.noise_ratio`
        "unit_first": np.array([metadata(frame)["sigma"] * np.sqrt((1 + 1 / (1 - f)) / 2) for frame in first.values()]),
    }


def compared(found: dict[str, np.ndarray], truth: fi.Truth, queries: list[str], top: Ceiling) -> dict[str, float]:
    """One run's figures."""
    measured, error = truth.matrix(queries)
    p, q = measurements(truth, queries)
    sigma = p.std(axis=-1, ddof=1)
    change = (q.mean(axis=-1) - p.mean(axis=-1)) / sigma
    figures: dict[str, float] = {}
    for kind in ("", "_first"):
        mu = found[f"mu{kind}"]
        agreed = agreement(mu, measured, ceiling=top, estimated_se=found[f"se{kind}"], truth_se=error)
        shift = mu * found[f"unit{kind}"] / sigma
        figures |= {
            f"rank{kind}": agreed.spearman,
            f"slope{kind}": agreed.slope,
            f"coverage{kind}": float(agreed.coverage),
            f"shift{kind}": float((shift * change).sum() / (shift**2).sum()),
        }
    return figures


def _compare(options: argparse.Namespace, scratch: Path) -> None:
    settings, seeds = [SETTINGS[name] for name in options.settings], options.seeds
    if options.quick:
        options.runs, seeds = 16, [1]
        settings = [replace(settings[0], epochs=2)]
    made = Record("left_out", options, seeds={"recorded runs": seeds})
    rows: list[dict[str, Any]] = []
    for setting in settings:
        data = setting.data()
        queries = single_queries(data)
        truth = truth_of(setting, data, options.runs, (options.truth or scratch / "truth") / setting.name)
        top = ceiling(*truth.split_halves(queries))
        recorded = [
            record(setting, data, scratch / f"{setting.name}-{seed}", seed=seed, signals="batch", live=False)
            for seed in seeds
        ]
        figures = [
            compared(
                estimates(setting, data, run, queries),
                truth,
                queries,
                top,
            )
            for run in recorded
        ]
        means = {key: float(np.mean([each[key] for each in figures])) for key in figures[0]}
        rows.append({"setting": setting.name, "note": setting.note, "ceiling": top.correlation} | means)
        made.table(
            f"22 subsets, 40 queries; means over {len(seeds)} recorded runs, batch signals; {options.runs} pairs of "
            "retrainings",
            COLUMNS,
            rows,
        )


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=[*DEFAULT, "tanh-sgd-100"])
    made.add_argument("--runs", type=int, default=128, help="retrainings an arm")
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="recorded runs, by their batch order")
    made.add_argument("--truth", type=Path, default=None, help="keep (and reuse) the retrainings here")
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _compare(options, Path(folder))


if __name__ == "__main__":
    main()
