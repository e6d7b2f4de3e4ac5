"""What several runs, asked as one, say each by itself: how much of the page another run would say again."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finfluence.influence import aligned
from finfluence.runs.pooling import PooledRuns, Recorded
from finfluence.workflows.report import _charts as charts
from finfluence.workflows.report._columns import ends
from finfluence.workflows.report._packing import Payload, floats

CERTAIN = 0.05
_DRAWN = 12  # samples at either end of the ranking that the chart shows


def names_of(run: Recorded) -> list[str]:
    """Names of the runs that are asked: their directories' last parts, or all of these where the last are alike."""
    names = [one.name for one in run.runs]
    return names if len(set(names)) == len(names) else [str(one.directory) for one in run.runs]


def pack_each(
    payload: Payload, run: Recorded, query: str, *, place: int, frame: pl.DataFrame, top: NDArray[np.int64]
) -> dict[str, Any] | None:
    """Put every run's own μ of the top samples into the payload.

    Args:
        payload: to fill.
        run: a run, or several as one.
        query: name of the query.
        place: its place among the page's queries.
        frame: `run.influence(query)`.
        top: codes of the samples.

    Returns:
        The section on the runs' agreement; None for a single run.
    """
    if not isinstance(run, PooledRuns):
        return None
    mu, q = aligned(run.each(query), "mu", "q_value", on="sample")
    payload.array(f"each-rows:{place}", top, "uint32")
    payload.array(f"each-mu:{place}", mu[:, top].T, "float32")
    payload.array(f"each-certain:{place}", (q[:, top] <= CERTAIN).sum(axis=0), "uint8")
    return _section(run, query, mu=mu, frame=frame)


def _section(run: PooledRuns, query: str, *, mu: NDArray[np.float64], frame: pl.DataFrame) -> dict[str, Any]:
    from finfluence.workflows.comparison import compare_runs

    found = compare_runs(run.runs, query, top=(0.1,))
    tenth, ranks = found.figure("Jaccard", "top 10 %"), found.figure("rank correlation", "all")
    once = int((found.samples["flagged_by"] > 0).sum())
    text = (
        f"Of the tenth of lowest μ, two of these {len(run.runs)} runs share {tenth.value:.2f} (Jaccard, mean over "
        f"pairs); their ranks correlate by {ranks.value:.2f} (Spearman). {len(found.agreed):,} samples are certainly "
        f"harmful in every run, {once:,} in at least one (one-sided, false-discovery rate {found.fdr:g}). The chart "
        "has the samples of lowest and highest μ: a point is what one run says, the bar the interval of all."
    )
    pooled, names = floats(frame["mu"]), names_of(run)
    shown = ends(pooled, _DRAWN)
    rows = [
        {
            "sample": str(frame["sample"][int(code)]),
            "mu": float(pooled[code]),
            "low": float(frame["ci_low"][int(code)]),
            "high": float(frame["ci_high"][int(code)]),
            "each": {name: float(own) for name, own in zip(names, mu[:, code], strict=True)},
        }
        for code in shown[np.argsort(pooled[shown], kind="stable")]
    ]
    figures = found.frame.select("measure", "set", "value", "meaning").iter_rows()
    return {
        "text": text,
        "chart": charts.runs_chart(rows),
        "caption": "Agreement of the runs",
        "titles": ["figure", "of", "value", "meaning"],
        "table": [[m, s, "–" if value is None else f"{value:.2f}", meaning] for m, s, value, meaning in figures],
    }
