"""What retraining says: influence measured on models that were trained with and without each subset."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl

from finfluence.errors import InputError, OracleError
from finfluence.influence.metadata import attach
from finfluence.influence.table import q_values
from finfluence.runs.oracle.arms import BASE
from finfluence.runs.oracle.store import TruthStore
from finfluence.tradeoff import TradeoffCurve, compare, gaussian_estimates, gaussianity, tradeoff_curve

TruthEstimator = Literal["gaussian", "rank"]
Epoch = float | Literal["mean"] | None
LEAST_RUNS = 4
# trainings whose measurements agree this closely (relatively) differ by the rounding of float32 alone
_ROUNDING = 16 * float(np.finfo(np.float32).eps)

_SCHEMA = {
    "subset": pl.String,
    "size": pl.Int64,
    "mu": pl.Float64,
    "se": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "p_value": pl.Float64,
    "q_value": pl.Float64,
    "runs_with": pl.Int64,
    "runs_without": pl.Int64,
    "missing": pl.Int64,
    "normality_p": pl.Float64,
    "variance_ratio_p": pl.Float64,
    "mean_with": pl.Float64,
    "mean_without": pl.Float64,
    "change_se": pl.Float64,
}


class Losses(NamedTuple):
    """Measurements of finished trainings.

    Attributes:
        trained_with: (runs_with,) of the base arm, in the order of runs.
        trained_without: (runs_without,) of the arm without the subset. With paired orders the k-th values of both are a
            pair: runs that only one arm has finished are left out.
    """

    trained_with: np.ndarray
    trained_without: np.ndarray


class _Arm(NamedTuple):
    """An arm's finished trainings: (runs,) their indices, ascending, and (queries, runs) measurements."""

    runs: np.ndarray
    values: np.ndarray


class Truth:
    """The measurements of an experiment's trainings; `retrain` makes one and `open_truth` reads one.

    Args:
        manifest: of the experiment, see `TruthStore`.
        trainings: one row for each training and measured epoch.

    Attributes:
        queries: names of the queries.
        subsets: sample ids of each subset, by name.
        epochs: epochs after which the queries were measured; the last is the end of training.
        paired: whether the k-th trainings of all arms have one batch order, see `retrain`.
    """

    def __init__(self, manifest: dict[str, Any], trainings: pl.DataFrame) -> None:
        self.experiment: dict[str, Any] = manifest["experiment"]
        self.queries: list[str] = list(self.experiment["queries"])
        self.epochs: list[float] = list(self.experiment["measured_epochs"])
        self.subsets: dict[str, np.ndarray] = {name: np.asarray(s["ids"]) for name, s in manifest["subsets"].items()}
        self._arms = {name: str(s["arm"]) for name, s in manifest["subsets"].items()}
        self.paired = self.experiment["orders"] == "paired"
        self._trainings = trainings
        self._values: dict[tuple[str, float | str], _Arm] = {}

    def __repr__(self) -> str:
        size = f"{len(self.subsets)} subsets, {len(self.queries)} queries"
        return f"Truth({size}, {self.runs(None)} trainings with all samples)"

    def influence(
        self, query: str, *, estimator: TruthEstimator = "gaussian", level: float = 0.95, epoch: Epoch = None
    ) -> pl.DataFrame:
        """Influence of every subset on a query.

        Args:
            query: name of the query.
            estimator: "gaussian" (mean difference over pooled sd) or "rank" (sqrt(2) Phi^-1(AUC), which has no use for
                pairs); see `compare`.
            level: of the intervals.
            epoch: one of `epochs`, "mean" for the mean of the measurements after each, None for the end of training.

        Returns:
            One row a subset: subset, size, mu, se, ci_low, ci_high, p_value, q_value (Benjamini-Hochberg over subsets),
            runs_with, runs_without, missing, normality_p, variance_ratio_p; and, in the measurement's own unit, the
            arms' means, mean_with and mean_without, and the standard error of their difference, change_se. Where fewer
            than 4 runs of an arm (4 pairs) are finished, mu and what follows from it are null and `missing` says how
            many trainings are wanted (0 elsewhere). mu > 0: the subset supports the measured behaviour.

        Raises:
            InputError: unknown query, estimator or epoch.
            OracleError: no subset has enough finished runs, or the measurements do not vary between runs.
        """
        if estimator not in get_args(TruthEstimator):
            raise InputError(f"unknown estimator {estimator!r}; choose one of {', '.join(get_args(TruthEstimator))}")
        rows = []
        for name, ids in self.subsets.items():
            p, q = self.losses(query, name, epoch=epoch)
            row: dict[str, Any] = {
                "subset": name,
                "size": len(ids),
                "runs_with": len(p),
                "runs_without": len(q),
                "missing": self._wanted(self._arms[name]),
            }
            if row["missing"] == 0:
                self._check_variation(query, p, q)
                found = compare(p, q, estimator=estimator, paired=self.paired and estimator == "gaussian")
                low, high = found.interval(level)
                row |= {"mu": found.mu, "se": found.se, "ci_low": low, "ci_high": high, "p_value": found.p_value}
                row |= {"mean_with": p.mean(), "mean_without": q.mean(), "change_se": self._change_error(p, q)}
                if min(np.ptp(p), np.ptp(q)) > _ROUNDING * np.abs(p).max():
                    looks = gaussianity(p, q)
                    row |= {"normality_p": looks.normality_p, "variance_ratio_p": looks.variance_p}
            rows.append(row)
        if all(row["missing"] for row in rows):
            raise OracleError(self._too_few(rows))
        frame = pl.DataFrame(rows, schema=_SCHEMA)
        p_values = frame["p_value"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        frame = frame.with_columns(pl.Series("q_value", q_values(p_values)).fill_nan(None))
        return attach(
            frame,
            query=query,
            estimator=estimator,
            level=level,
            unit="standard deviations over retrainings",
            budget=self.experiment["budget"],
            orders=self.experiment["orders"],
            epoch=self._epoch(epoch),
            condition=(
                "conditional on the initialisation"
                if self.experiment["initialisation"] == "fixed"
                else "over random initialisations"
            ),
        )

    def losses(self, query: str, subset: str, *, epoch: Epoch = None) -> Losses:
        """Measurements of a query by models trained with and without a subset (`Losses`).

        Raises:
            InputError: unknown query, subset or epoch.
        """
        column = self._columns([query])[0]
        p, q = self._both(self._arm_of(subset), epoch)
        return Losses(p[column], q[column])

    def tradeoff_curve(self, query: str, subset: str) -> TradeoffCurve:
        """The empirical trade-off function T(P, Q) of a subset; see `finfluence.tradeoff.tradeoff_curve`.

        Raises:
            InputError: unknown query or subset.
            OracleError: fewer than 4 finished runs in an arm.
        """
        p, q = self.losses(query, subset)
        if _missing(p) or _missing(q):
            raise OracleError(
                f"{len(p)} finished runs with and {len(q)} without subset {subset!r}; each "
                f"needs {LEAST_RUNS}, train more"
            )
        return tradeoff_curve(p, q)

    def matrix(self, queries: Sequence[str] | None = None, *, epoch: Epoch = None) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian estimates of every query and subset.

        Args:
            queries: names; None for all.
            epoch: one of `epochs`, "mean" for the mean of the measurements after each, None for the end of training.

        Returns:
            mu and its standard error, each (queries, subsets); nan where an arm has fewer than 4 finished runs.

        Raises:
            InputError: unknown query or epoch.
            OracleError: the measurements of a query do not vary between runs.
        """
        return self._estimates(queries, slice(None), epoch)

    def split_halves(
        self, queries: Sequence[str] | None = None, *, epoch: Epoch = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """mu of every query and subset, twice, from disjoint halves of the trainings of every arm, the base arm too.

        Their correlation is the reliability of half as many runs; Spearman-Brown carries it to all of them.

        Args:
            queries: names; None for all.
            epoch: one of `epochs`, "mean" for the mean of the measurements after each, None for the end of training.

        Returns:
            Two (queries, subsets) arrays; nan where half an arm has fewer than 4 finished runs.

        Raises:
            InputError: unknown query or epoch.
        """
        first, second = (self._estimates(queries, slice(half, None, 2), epoch)[0] for half in (0, 1))
        return first, second

    def runs(self, subset: str | None) -> int:
        """Number of finished trainings without a subset (None: with all samples)."""
        return len(self._arm(BASE if subset is None else self._arm_of(subset), None).runs)

    def failed(self) -> pl.DataFrame:
        """Trainings that failed: subset (null for the base arm), arm, run, seed, error, seconds."""
        names = pl.DataFrame(
            {"arm": list(self._arms.values()), "subset": list(self._arms)},
            schema={"arm": pl.String, "subset": pl.String},
        )
        failed = self._trainings.filter(pl.col("status") == "failed")
        return failed.join(names, on="arm", how="left").select("subset", "arm", "run", "seed", "error", "seconds")

    def _estimates(self, queries: Sequence[str] | None, part: slice, epoch: Epoch) -> tuple[np.ndarray, np.ndarray]:
        names = self.queries if queries is None else list(queries)
        columns = self._columns(names)
        mu = np.full((len(names), len(self._arms)), np.nan)
        se = np.full_like(mu, np.nan)
        for j, arm in enumerate(self._arms.values()):
            p, q = (values[columns][:, part] for values in self._both(arm, epoch))
            if not _missing(p) and not _missing(q):
                for row, name in enumerate(names):
                    self._check_variation(name, p[row], q[row])
                found = gaussian_estimates(p, q, paired=self.paired)
                mu[:, j], se[:, j] = found.mu, found.se
        return mu, se

    def _both(self, arm: str, epoch: Epoch) -> tuple[np.ndarray, np.ndarray]:
        """Measurements of the base arm and of another one, each (queries, runs); of pairs those that both have."""
        base, other = self._arm(BASE, epoch), self._arm(arm, epoch)
        if not self.paired:
            return base.values, other.values
        _, first, second = np.intersect1d(base.runs, other.runs, assume_unique=True, return_indices=True)
        return base.values[:, first], other.values[:, second]

    def _change_error(self, p: np.ndarray, q: np.ndarray) -> float:
        """Standard error of the difference of two arms' means."""
        if self.paired:
            return float(np.std(q - p, ddof=1)) / math.sqrt(len(p))
        return math.sqrt(p.var(ddof=1) / len(p) + q.var(ddof=1) / len(q))

    def _wanted(self, arm: str) -> int:
        """How many trainings are missing before an arm can be compared with the base arm."""
        alone = _missing(self._arm(BASE, None).values) + _missing(self._arm(arm, None).values)
        return alone or _missing(self._both(arm, None)[0])

    def _arm(self, arm: str, epoch: Epoch) -> _Arm:
        """An arm's finished trainings."""
        key = (arm, self._epoch(epoch))
        if key not in self._values:
            own = self._trainings.filter((pl.col("arm") == arm) & (pl.col("status") == "finished"))
            if key[1] == "mean":
                own = own.group_by("run").agg(pl.col(self.queries).mean())
            else:
                own = own.filter(pl.col("epoch") == key[1])
            own = own.sort("run")
            self._values[key] = _Arm(own["run"].to_numpy(), own.select(self.queries).to_numpy().T)
        return self._values[key]

    def _epoch(self, epoch: Epoch) -> float | Literal["mean"]:
        if epoch is not None and epoch != "mean" and epoch not in self.epochs:
            known = ", ".join(map(str, self.epochs))
            raise InputError(f"epoch {epoch!r} was not measured; choose one of {known}, or 'mean'")
        return self.epochs[-1] if epoch is None else epoch

    def _columns(self, queries: Sequence[str]) -> list[int]:
        for query in queries:
            if query not in self.queries:
                raise InputError(f"unknown query {query!r}; this truth has {', '.join(self.queries)}")
        return [self.queries.index(query) for query in queries]

    def _arm_of(self, subset: str) -> str:
        if subset not in self._arms:
            raise InputError(f"unknown subset {subset!r}; this truth has {', '.join(self._arms)}")
        return self._arms[subset]

    def _check_variation(self, query: str, p: np.ndarray, q: np.ndarray) -> None:
        size = max(np.abs(p).max(), np.abs(q).max())
        if max(np.ptp(p), np.ptp(q)) <= _ROUNDING * size:
            raise OracleError(
                f"deterministic training: query {query!r} measures {p[0]:.6g} in all {len(p)} runs with all samples "
                f"(and {q[0]:.6g} in all {len(q)} without), so mu is undefined; use smaller batches or "
                "initialisation='random'"
            )

    def _too_few(self, rows: list[dict[str, Any]]) -> str:
        best = min(rows, key=lambda row: row["missing"])
        text = (
            f"{best['runs_with']} finished runs with all samples and {best['runs_without']} without "
            f"{best['subset']!r}; each arm needs {LEAST_RUNS}, {best['missing']} more in all"
        )
        errors = self.failed()["error"]
        return f"{text} ({len(errors)} failed, the last with: {errors[-1]})" if len(errors) else f"{text}; raise runs"


def open_truth(directory: str | os.PathLike[str]) -> Truth:
    """Reads what is stored of an experiment, finished or not.

    Args:
        directory: as given to `retrain`; a path or an fsspec URL.

    Raises:
        OracleError: there is no experiment, or it cannot be read.
    """
    store = TruthStore(directory)
    manifest = store.manifest()
    if manifest is None:
        raise OracleError(f"{store.folder.display} holds no truth.json; give the directory of a retraining experiment")
    return Truth(manifest, store.trainings(manifest["experiment"]["queries"]))


def _missing(values: np.ndarray) -> int:
    return max(0, LEAST_RUNS - values.shape[-1])
