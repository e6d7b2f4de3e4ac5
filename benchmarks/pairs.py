"""What pairs of retrainings of one batch order are worth, beside as many independent ones.

    python -m benchmarks pairs                          # eight settings of `calibration`: half an hour on two cores
    python -m benchmarks pairs --settings tanh-sgd text
    python -m benchmarks pairs --quick

The settings, subsets and queries are those of `calibration`. The independent trainings are the same ones, each with
the partner of another pair. Intervals of a few pairs are held against μ by all the others.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import finfluence as fi
from benchmarks._calibration_problems import SETTINGS, Setting
from benchmarks._records import Record, parser
from benchmarks.calibration import single_queries, truth_of
from finfluence.tradeoff import gaussian_estimates

DEFAULT = (
    "tanh-sgd",
    "tanh-sgd-coherent",
    "tanh-sgd-fast",
    "tanh-sgd-falling",
    "relu-sgd",
    "relu-adamw",
    "cnn-momentum",
    "text",
)
COLUMNS = {
    "note": "setting",
    "correlation": "correlation in a pair|.2f",
    "paired": "sd of the difference, in σ: pairs|.2f",
    "independent": "independent|.2f",
    "worth": "independent trainings that say as much as one pair's|.1f",
    "width": "half an interval, pairs|.2f",
    "width_independent": "half an interval, independent|.2f",
    "covered": "covered, pairs|.1%",
    "covered_independent": "covered, independent|.1%",
}


def measurements(truth: fi.Truth, queries: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of models with all samples and without each subset: (queries, subsets, runs) each, pairs at the same places."""
    found = [[truth.losses(query, subset) for subset in truth.subsets] for query in queries]
    both = np.array(found)
    return both[:, :, 0], both[:, :, 1]


def intervals(p: np.ndarray, q: np.ndarray, truth: np.ndarray, *, paired: bool) -> tuple[float, float]:
    """Median half width of the 95 % intervals, and the share of them that hold the truth."""
    low, high = gaussian_estimates(p, q, paired=paired).interval(0.95)
    return float(np.median(high - low) / 2), float(np.mean((low <= truth) & (truth <= high)))


def row(setting: Setting, truth: fi.Truth, queries: list[str], few: int) -> dict[str, Any]:
    p, q = measurements(truth, queries)
    runs = p.shape[-1]
    sigma2 = (p.var(axis=-1, ddof=1) + q.var(axis=-1, ddof=1)) / 2
    stranger = np.roll(q, few, axis=-1)
    apart, apart_strangers = (((other - p).var(axis=-1, ddof=1) / sigma2).mean() for other in (q, stranger))
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for start in range(0, runs - few + 1, few):
        part, rest = np.arange(start, start + few), np.r_[0:start, start + few : runs]
        expected = gaussian_estimates(p[..., rest], q[..., rest], paired=True).mu
        found[True].append(intervals(p[..., part], q[..., part], expected, paired=True))
        found[False].append(intervals(p[..., part], stranger[..., part], expected, paired=False))
    (width, covered), (width_independent, covered_independent) = (
        np.mean(found[kind], axis=0) for kind in (True, False)
    )
    return {
        "setting": setting.name,
        "note": setting.note,
        "correlation": 1 - apart / 2,
        "paired": np.sqrt(apart),
        "independent": np.sqrt(apart_strangers),
        "worth": apart_strangers / apart,
        "width": width,
        "width_independent": width_independent,
        "covered": covered,
        "covered_independent": covered_independent,
    }


def _compare(options: argparse.Namespace, scratch: Path) -> None:
    settings = [SETTINGS[name] for name in options.settings]
    if options.quick:
        options.runs, options.few = 16, 4
        settings = [replace(settings[0], epochs=2)]
    record = Record("pairs", options, seeds="runs 0 to runs - 1 of each arm, paired by run")
    rows = []
    for setting in settings:
        data = setting.data()
        truth = truth_of(setting, data, options.runs, scratch / setting.name)
        rows.append(row(setting, truth, single_queries(data), options.few))
        title = (
            f"{options.runs} retrainings an arm; intervals by {options.few} pairs, and by {options.few} + {options.few}"
        )
        record.table(title, COLUMNS, rows)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(DEFAULT))
    made.add_argument("--runs", type=int, default=128, help="retrainings an arm")
    made.add_argument("--few", type=int, default=8, help="pairs whose intervals are looked at")
    made.add_argument("--truth", type=Path, default=None, help="keep (and reuse) the retrainings here")
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _compare(options, options.truth or Path(folder))


if __name__ == "__main__":
    main()
