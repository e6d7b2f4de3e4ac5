"""Compare runs of one training under other seeds: what stays the same, what changes, and is what stays right?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.influence import aligned
from finfluence.influence.consistency import (
    Figure,
    joint_recall,
    mean_over_pairs,
    pairwise_jaccard,
    pairwise_spearman,
    top_sets,
    variation,
)
from finfluence.runs.pooling import check_same_data, warn_of_copies
from finfluence.runs.run import Run, open_run
from finfluence.signals import SELF
from finfluence.tradeoff import SIGN_CONVENTION

Effect = Literal["harmful", "supporting"]


@dataclass(frozen=True)
class RunComparison:
    """What several runs agree on.

    Attributes:
        query: what they were asked.
        effect: "harmful" (the most negative μ first) or "supporting" (the most positive first).
        runs: directory of each run.
        fdr: false-discovery rate at which a run flags samples.
        frame: one row a figure: measure, set, value, ci_low, ci_high, meaning.
        pairs: one row a pair of runs and set: run_a, run_b, set, jaccard; the set "all" has the rank correlation.
        samples: one row a sample: sample, mean_mu, sd_mu, flagged_by (number of runs), and the column of known rows.
    """

    query: str
    effect: Effect
    runs: tuple[str, ...]
    fdr: float
    frame: pl.DataFrame
    pairs: pl.DataFrame
    samples: pl.DataFrame

    def figure(self, measure: str, set: str) -> Figure:
        """One figure of the frame.

        Raises:
            InputError: no such figure.
        """
        rows = self.frame.filter((pl.col("measure") == measure) & (pl.col("set") == set))
        if rows.is_empty():
            known = ", ".join(f"{m} of {s}" for m, s in self.frame.select("measure", "set").iter_rows())
            raise InputError(f"there is no {measure!r} of {set!r}; there are {known}")
        row = rows.row(0, named=True)
        return Figure(*(float("nan") if row[k] is None else row[k] for k in ("value", "ci_low", "ci_high")))

    @property
    def agreed(self) -> list[Any]:
        """Ids of the samples that every run flags."""
        return self.samples.filter(pl.col("flagged_by") == len(self.runs))["sample"].to_list()

    def __str__(self) -> str:
        flagged = self.samples.filter(pl.col("flagged_by") > 0).height
        lines = [
            f"{len(self.runs)} runs asked about {self.query!r}, {self.effect} samples. {SIGN_CONVENTION}",
            f"{len(self.agreed)} samples are flagged by every run, {flagged} by at least one (false-discovery rate "
            f"{self.fdr:g}).",
        ]
        for row in self.frame.iter_rows(named=True):
            ends = (row["ci_low"], row["ci_high"])
            value = Figure(*(float("nan") if x is None else x for x in (row["value"], *ends)))
            lines.append(f"{row['measure']} of {row['set']}: {value}")
        return "\n".join(lines)


def compare_runs(
    runs: Sequence[Run | str | os.PathLike[str]],
    query: str | None = None,
    *,
    top: Sequence[float] = (0.01, 0.05, 0.10),
    fdr: float = 0.05,
    effect: Effect | None = None,
    known: str | None = None,
    sensitivity: Literal["run", "live"] = "run",
    level: float = 0.95,
) -> RunComparison:
    """Compare the influence that several runs of one training report.

    Args:
        runs: two or more recorded runs, or their directories, on the same samples.
        query: a query that all of them recorded; may be left out where there is one. "self" for self-influence.
        top: shares of the samples, most extreme first, whose sets are compared.
        fdr: a run flags the samples with a one-sided q-value at most this.
        effect: which end counts: "harmful" (μ < 0, the default) or "supporting" (μ > 0, the default for "self", where
            the mislabelled have the largest μ).
        known: column of the sample table that marks rows known to be bad (true or 1); adds recall and the joint figure.
        sensitivity: "live" for the live signals beside a replay.
        level: of the intervals.

    Returns:
        The comparison.

    Raises:
        InputError: fewer than two runs, one run twice, runs on other samples or other contents, an unknown query or
            column, a share or rate out of range.
    """
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    names = tuple(str(run.directory) for run in opened)
    if len(opened) < 2:
        raise InputError(f"comparing needs two or more runs, got {len(opened)}; give several run directories")
    check_same_data(opened)
    if not 0 < fdr < 1:
        raise InputError(f"the false-discovery rate must lie between 0 and 1, got {fdr:g}")
    name = _common_query(opened, query)
    chosen: Effect = effect or ("supporting" if name == SELF else "harmful")
    if chosen not in get_args(Effect):
        raise InputError(f"unknown effect {chosen!r}; choose harmful or supporting")
    frames = [run.influence(name, alternative=chosen, level=level, sensitivity=sensitivity) for run in opened]
    table = opened[0].samples()
    mu, q, ids = _seen_by_all(frames)
    bad = None if known is None else _known(table, known, ids)
    score = -mu if chosen == "harmful" else mu
    flagged = (q <= fdr) & (score > 0)
    sets = {f"top {share * 100:g} %": top_sets(score, share) for share in top}
    rows, pairs = _figures(score, sets | {"flagged": flagged}, names=names, level=level)
    if bad is not None:
        rows += _against_known(sets | {"flagged": flagged}, bad, level=level)
    spread = {"mean_mu": mu.mean(axis=0), "sd_mu": mu.std(axis=0, ddof=1), "flagged_by": flagged.sum(axis=0)}
    samples = pl.DataFrame({"sample": ids, **spread} | ({known: bad} if known is not None else {}))
    columns = ("measure", "set", "value", "ci_low", "ci_high", "meaning")
    frame = pl.DataFrame(rows, schema=list(columns), orient="row").with_columns(pl.col(columns[2:5]).fill_nan(None))
    return RunComparison(name, chosen, names, fdr, frame, pairs, samples.sort("flagged_by", descending=True))


Row = tuple[str, str, float, float, float, str]


def _row(measure: str, set: str, figure: Figure, meaning: str) -> Row:
    return measure, set, figure.value, figure.low, figure.high, meaning


def _figures(
    score: np.ndarray, sets: dict[str, np.ndarray], *, names: tuple[str, ...], level: float
) -> tuple[list[Row], pl.DataFrame]:
    """Agreement of the runs with each other: rows of the frame, and the pairs behind them."""
    ranks = pairwise_spearman(score)
    agreement = mean_over_pairs(ranks, level=level, bounds=(-1.0, 1.0))
    rows = [_row("rank correlation", "all", agreement, "mean over pairs, Spearman")]
    upper = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    pairs: list[dict[str, Any]] = [
        {"run_a": names[a], "run_b": names[b], "set": "all", "jaccard": None, "spearman": ranks[a, b]} for a, b in upper
    ]
    for name, members in sets.items():
        jaccard = pairwise_jaccard(members)
        rows.append(_row("Jaccard", name, mean_over_pairs(jaccard, level=level), "mean over pairs, |A ∩ B|/|A ∪ B|"))
        pairs += [
            {"run_a": names[a], "run_b": names[b], "set": name, "jaccard": jaccard[a, b], "spearman": None}
            for a, b in upper
        ]
    mean = score.mean(axis=0, keepdims=True)
    for name, members in sets.items():
        matters = members.any(axis=0) if name == "flagged" else top_sets(mean, members[0].mean())[0]
        if matters.any():
            meaning = "sd/|mean| of μ over runs, median over " + (
                "samples that any run flags" if name == "flagged" else "the top samples of the mean μ"
            )
            rows.append(_row("coefficient of variation", name, variation(score, members=matters, level=level), meaning))
    schema = {"run_a": pl.String, "run_b": pl.String, "set": pl.String, "jaccard": pl.Float64, "spearman": pl.Float64}
    return rows, pl.DataFrame(pairs, schema=schema).with_columns(pl.col("jaccard", "spearman").fill_nan(None))


def _against_known(sets: dict[str, np.ndarray], bad: np.ndarray, *, level: float) -> list[Row]:
    """Recall of the known rows by each run and by all of them together."""
    rows: list[Row] = []
    for name, members in sets.items():
        recall = members[:, bad].mean(axis=1)
        mean = Figure(float(recall.mean()), float(recall.min()), float(recall.max()))
        rows.append(_row("recall", name, mean, "share of known rows found, mean over runs (lowest to highest run)"))
        meaning = "share of known rows that every run finds (Wilson interval over the rows)"
        rows.append(_row("joint recall", name, joint_recall(members, bad, level=level), meaning))
        picked = members.sum(axis=1)
        if picked.any():
            precision = members[:, bad].sum(axis=1)[picked > 0] / picked[picked > 0]
            mean = Figure(float(precision.mean()), float(precision.min()), float(precision.max()))
            rows.append(_row("precision", name, mean, "share of the set that is known (lowest to highest run)"))
    return rows


def _common_query(runs: Sequence[Run], query: str | None) -> str:
    if query == SELF:
        return query
    common = [name for name in runs[0].queries if all(name in run.queries for run in runs)]
    if query is None and len(common) == 1:
        return common[0]
    if query is None or query not in common:
        asked = "choose one with --query" if query is None else f"query {query!r} is not in all of them"
        raise InputError(f"the runs share the queries {', '.join(common) or 'none'}; {asked}")
    return query


def _seen_by_all(frames: Sequence[pl.DataFrame]) -> tuple[np.ndarray, np.ndarray, pl.Series]:
    """(runs, n) μ, (runs, n) q-values and the ids, in the first run's order; samples that a run never saw are out."""
    first = frames[0]
    mu, q = aligned(frames, "mu", "q_value", on="sample")
    seen: np.ndarray = np.all(np.isfinite(mu), axis=0)
    if not seen.any():
        raise InputError("no sample has an influence in every run; record whole epochs")
    warn_of_copies(mu[:, seen])
    return mu[:, seen], q[:, seen], first["sample"].filter(pl.Series(seen.tolist(), dtype=pl.Boolean))


def _known(table: pl.DataFrame, column: str, ids: pl.Series) -> np.ndarray:
    """(n,) bool, the rows that a column of the sample table marks."""
    if column not in table.columns:
        others = ", ".join(c for c in table.columns if c != "sample")
        raise InputError(f"unknown column {column!r}; the sample table has {others or 'no further columns'}")
    kind = table[column].dtype
    values = set(table[column].drop_nulls().unique().to_list()) if kind.is_integer() else set()
    if kind != pl.Boolean and not (kind.is_integer() and values <= {0, 1}):
        raise InputError(f"column {column!r} is {kind}; known rows are marked with true and false, or 1 and 0")
    marks = pl.DataFrame({"sample": ids}).join(table, on="sample", how="left", maintain_order="left")[column]
    bad = marks.fill_null(value=False).cast(pl.Boolean).to_numpy()
    if not bad.any():
        raise InputError(f"column {column!r} marks no sample; the joint figure needs some known rows")
    return bad
