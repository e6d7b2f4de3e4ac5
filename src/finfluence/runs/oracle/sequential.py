"""Retraining in steps, until the intervals are narrow enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from finfluence.errors import InputError
from finfluence.runs.oracle.retraining import Retraining
from finfluence.runs.oracle.truth import LEAST_RUNS, Epoch, Truth, TruthEstimator


@dataclass(frozen=True)
class Interim:
    """Where a sequential experiment stands.

    Attributes:
        runs: trainings an arm so far.
        truth: all measurements so far.
        influence: `Truth.influence` of the query in question.
        width: of the widest interval of mu; infinite while one is missing.
        reached: whether `width` is at most the precision asked for.
    """

    runs: int
    truth: Truth
    influence: pl.DataFrame
    width: float
    reached: bool


def retrain_until(
    experiment: Retraining,
    query: str,
    *,
    precision: float,
    runs: int = 128,
    step_runs: int = 16,
    estimator: TruthEstimator = "gaussian",
    level: float = 0.95,
    epoch: Epoch = None,
) -> Iterator[Interim]:
    """Retrains in steps until the intervals of mu are narrow enough.

    Stopping by width leaves estimates and intervals nearly as good as those of a number of runs fixed beforehand
    (stopping when mu is significant would not).

    Args:
        experiment: what to train.
        query: whose influence must become precise.
        precision: largest width of an interval of mu, in standard deviations; for a small mu it takes about 30 (1 -
            rho) / precision^2 runs, rho the correlation of paired measurements.
        runs: where to stop at the latest.
        step_runs: runs added to each arm between two looks.
        estimator: see `Truth.influence`.
        level: of the intervals.
        epoch: see `Truth.influence`.

    Yields:
        The state after each step; the last one has `reached`, or `runs` runs.

    Raises:
        InputError: an argument cannot be used.
        OracleError: see `retrain` and `Truth.influence`.
    """
    if query not in experiment.problem.queries:
        raise InputError(f"unknown query {query!r}; this experiment has {', '.join(experiment.problem.queries)}")
    if not precision > 0:
        raise InputError(f"precision must be positive, got {precision!r}")
    if runs < LEAST_RUNS or step_runs < 1:
        raise InputError(f"runs must be at least {LEAST_RUNS} and step_runs at least 1, got {runs} and {step_runs}")
    done = 0
    while done < runs:
        done = min(runs, max(LEAST_RUNS, done + step_runs))
        truth = experiment.extend(done)
        # the directory may hold subsets of earlier experiments, which are not this one's business
        names = list(experiment.subset_names)
        found = truth.influence(query, estimator=estimator, level=level, epoch=epoch)
        influence = found.filter(pl.col("subset").is_in(names))
        widths = (influence["ci_high"] - influence["ci_low"]).fill_null(float("inf"))
        width = float(widths.to_numpy().max())
        yield Interim(done, truth, influence, width, width <= precision)
        if width <= precision:
            return
