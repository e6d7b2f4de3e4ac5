"""What the page says about one query: estimates as `score` gives them, groups, removal, checks by retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finfluence.errors import FinfluenceError, InputError
from finfluence.influence import metadata
from finfluence.runs.pooling import Recorded
from finfluence.runs.run import Run
from finfluence.signals import arrays
from finfluence.tradeoff import GaussianInfluence
from finfluence.workflows.report import _charts as charts
from finfluence.workflows.report._columns import category
from finfluence.workflows.report._packing import Payload, display_decimals, floats, single, units
from finfluence.workflows.report._several import CERTAIN, names_of, pack_each

LEVEL = 0.95
_MOST_GROUPS = 40
_GROUP_COLUMNS = 6
_SCATTER = 1200


def pack_query(
    payload: Payload,
    run: Recorded,
    query: str,
    *,
    place: int,
    frame: pl.DataFrame,
    categories: Sequence[str],
    top: NDArray[np.int64],
    visits: int,
) -> None:
    """Put one query into the payload.

    Args:
        payload: to fill.
        run: the run, or several as one.
        query: name of the query.
        place: its place among the page's queries.
        frame: `run.influence(query)`.
        categories: columns of the sample table to group by.
        top: codes of the samples whose visits are shown, as far as they fit.
        visits: signals that may be shown.
    """
    decimals = display_decimals(frame["se"])
    columns = {name: floats(frame[name]) for name in frame.columns[1:]}
    payload.array(f"mu:{place}", single(columns["mu"], decimals), "float32")
    payload.array(f"low:{place}", units(columns["ci_low"], decimals), "int32")
    payload.array(f"high:{place}", units(columns["ci_high"], decimals), "int32")
    payload.array(f"q:{place}", single(columns["q_value"], 3), "float32")
    meta = metadata(frame)
    visits_text = _pack_visits(payload, run, query, place=place, meta=meta, top=top, room=visits)
    certain = columns["q_value"] <= CERTAIN
    groups, groups_note = _groups(run, query, categories)
    payload.json(
        f"query:{place}",
        {
            "name": query,
            "decimals": decimals,
            "level": LEVEL,
            "harmful": int((certain & (columns["mu"] < 0)).sum()),
            "supporting": int((certain & (columns["mu"] > 0)).sum()),
            "estimate": _estimate_note(run, meta),
            "visitsText": visits_text,
            "visitsNote": "The page has the visits of the samples of lowest and highest μ alone, to stay small.",
            "groups": groups,
            "groupsNote": groups_note,
            "removal": _removal(run, query),
            "verified": _verified(run, query),
            "agreement": _agreement(run, query, frame),
            "runs": pack_each(payload, run, query, place=place, frame=frame, top=top),
        },
    )


def _estimate_note(run: Recorded, meta: dict[str, Any]) -> str:
    kind = str(meta.get("sensitivity", run.sensitivity))
    text = {
        "replay": "Estimated by replay (the derivative of the whole recorded run)",
        "live": "Estimated from live signals: their order is meaningful, their scale is not calibrated",
    }.get(kind, f"Estimated by {kind}")
    if "measured_epochs" in meta:
        text += f", asked about the mean of {len(meta['measured_epochs'])} measurements on the way"
    if "sigma" in meta:
        text += f"; one unit of μ is {float(meta['sigma']):.3g} of the measurement"
    return f"{text}; {meta['condition']}." if "condition" in meta else f"{text}."


def _pack_visits(
    payload: Payload,
    run: Recorded,
    query: str,
    *,
    place: int,
    meta: dict[str, Any],
    top: NDArray[np.int64],
    room: int,
) -> str:
    """What each visit of the top samples contributed to μ: −(x_it − x̄_t)/σ, x̄_t the mean of the others in the batch.

    Of several runs, in the first: each has its own order of the samples.
    """
    first_run = run.runs[0]
    signals = arrays(first_run.store, query)
    steps, first, sizes = np.unique(signals.steps, return_index=True, return_counts=True)
    sums = np.add.reduceat(signals.values.astype(np.float64), first) if len(steps) else np.empty(0)
    rank = np.full(first_run.store.samples().select(pl.len()).collect().item(), -1, dtype=np.int64)
    rank[top] = np.arange(len(top))
    picked = np.flatnonzero(rank[signals.codes] >= 0)
    picked = picked[np.argsort(rank[signals.codes[picked]], kind="stable")]
    counts = np.bincount(rank[signals.codes[picked]], minlength=len(top))
    kept = int(np.searchsorted(np.cumsum(counts), room, side="right"))
    starts = np.concatenate([[0], np.cumsum(counts[:kept])]).astype(np.int64)
    picked = picked[: starts[-1]]
    at = np.searchsorted(steps, signals.steps[picked])
    values = signals.values[picked].astype(np.float64)
    if meta.get("budget") == "steps":
        # nothing takes the place of a sample that is alone in its batch
        others = np.maximum(sizes[at] - 1, 1)
        values = np.where(sizes[at] > 1, values - (sums[at] - values) / others, values)
    values = -values / float(meta.get("sigma", 1.0))
    payload.array(f"visit-rows:{place}", top[:kept], "uint32")
    payload.array(f"visit-starts:{place}", starts, "uint32")
    payload.array(f"visit-steps:{place}", signals.steps[picked], "uint32")
    payload.array(f"visit-values:{place}", values, "float32")
    if first_run.manifest.get("signals") == "full":
        text = "μ itself rests on many more evaluations of every sample (full signals)."
    else:
        text = "Bars: single visits; line: their running sum, which ends near μ."
    if len(run.runs) > 1:
        text += f" In {names_of(run)[0]} alone."
    return text


def _groups(run: Recorded, query: str, categories: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    from finfluence.workflows.removal import ids_digest, large_groups_note

    samples, measured = run.samples(), _measured(run, query)
    found: list[dict[str, Any]] = []
    left: list[str] = []
    sizes: list[tuple[str, int]] = []
    retrained = False
    for column in categories:
        distinct = samples[column].drop_nulls().n_unique() if column in samples.columns else 0
        if distinct < 2:
            continue
        if distinct > _MOST_GROUPS or len(found) == _GROUP_COLUMNS or samples[column].dtype.is_nested():
            left.append(column)
            continue
        frame = run.influence(query, groups=column).sort("mu", nulls_last=True)
        members = run.runs[0].groups(column) if measured else {}
        rows = [
            {
                "group": category(row["group"]),
                "size": row["size"],
                "mu": row["mu"],
                "low": row["ci_low"],
                "high": row["ci_high"],
                "q": row["q_value"],
            }
            | (measured.get(ids_digest(members[row["group"]].to_numpy()), {}) if measured else {})
            for row in frame.iter_rows(named=True)
        ]
        retrained = retrained or any("retrained" in row for row in rows)
        found.append({"column": column, "rows": rows})
        sizes += [(f"{column} {row['group']}", row["size"]) for row in rows]
    note = "Influence of all samples of a group together."
    if retrained:
        note += (
            " Where a group was retrained without, the second μ is what that measured; the first is a sum of samples."
        )
    if large := large_groups_note(pl.DataFrame(sizes, schema=["group", "size"], orient="row"), samples.height):
        note += f" {large}"
    if left:
        note += f" Not shown: {', '.join(left)} (too many values, or more than {_GROUP_COLUMNS} columns)."
    return found, note


def _measured(run: Recorded, query: str) -> dict[str, dict[str, Any]]:
    """What retraining measured of a query, by the digest of the removed samples."""
    from finfluence.workflows.removal import verified_entries

    found: dict[str, dict[str, Any]] = {}
    for entry in verified_entries(run.runs[0]):
        if entry.get("query") == query and isinstance(of := entry.get("measured"), dict):
            found[str(entry.get("ids_hash"))] = {"retrained": [of.get(key) for key in ("mu", "ci_low", "ci_high")]}
    return found


def _removal(run: Recorded, query: str) -> dict[str, Any] | None:
    from finfluence.workflows.removal import LARGE_CUT, large_cut_note, removal_curve

    try:
        curve = removal_curve(run, query, level=LEVEL)
    except FinfluenceError as error:
        return {"text": f"No removal curve: {error}", "chart": None}
    frame = curve.frame
    cut = None
    text = "No row is certain enough to recommend a cut."
    recommended = int(curve.recommended)
    if recommended:
        near = frame.row(int((frame["k"] - recommended).abs().arg_min() or 0), named=True)
        chance = 1 - GaussianInfluence(near["mu"]).superiority
        words = ">\u00a00.99" if chance > 0.995 else f"{chance:.2f}"
        exact = "" if near["k"] == recommended else f" (at k = {near['k']:,})"
        predicted = f"μ = {_signed(near['mu'])} ({_interval(near['ci_low'], near['ci_high'])})"
        text = (
            f"Recommended cut: the {recommended:,} most harmful rows ({100 * near['share']:.1f} % of the data). "
            f"Removing them together is predicted to give {predicted}{exact}: a retraining without them measures lower "
            f"with probability {words}."
        )
        if near["share"] > LARGE_CUT:
            text += f" {large_cut_note(near['share'])}"
        cut = {
            "title": f"The {near['k']:,} most harmful rows",
            "size": near["k"],
            "mu": near["mu"],
            "low": near["ci_low"],
            "high": near["ci_high"],
            "q": None,
        }
    if curve.measured.height:
        text += " Points with bars were measured by retraining."
    shown = charts.thin(frame, points=12)
    return {
        "text": text,
        "cut": cut,
        "chart": charts.removal_chart(frame, curve.measured, recommended=recommended),
        "caption": "Predicted influence of removing the most harmful rows",
        "titles": ["rows removed", "predicted μ", "95 % interval"],
        "table": [
            [f"{row['k']:,}", _signed(row["mu"]), _interval(row["ci_low"], row["ci_high"])]
            for row in shown.iter_rows(named=True)
        ],
    }


def _verified(run: Recorded, query: str) -> dict[str, Any] | None:
    from finfluence.workflows.removal import VERIFIED_FILE, verified

    try:
        rows = [_verified_row(entry) for entry in verified(run) if entry["query"] == query]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run.runs[0].directory}/{VERIFIED_FILE} is damaged ({type(error).__name__}: {error}); "
            "delete it and verify again"
        ) from error
    if not rows:
        return None
    return {
        "text": (
            f"{len(rows)} {'subset was' if len(rows) == 1 else 'subsets were'} checked by retraining with and without. "
            "On the diagonal, the prediction came true; bars are 95 % intervals."
        ),
        "chart": charts.verified_chart(rows),
        "caption": "Predicted and measured influence of verified subsets",
        "titles": ["subset", "samples", "predicted μ", "measured μ", "mean with → without", "pairs of retrainings"],
        "table": [
            [
                row["name"],
                f"{row['size']:,}",
                f"{_signed(row['predicted'])} ({_interval(row['predicted_low'], row['predicted_high'])})",
                f"{_signed(row['measured'])} ({_interval(row['measured_low'], row['measured_high'])})",
                row["means"],
                f"{row['runs']:,}",
            ]
            for row in rows
        ],
    }


def _verified_row(entry: dict[str, Any]) -> dict[str, Any]:
    predicted = GaussianInfluence(float(entry["predicted"]["mu"]), float(entry["predicted"]["se"] or 0.0))
    low, high = predicted.interval(LEVEL)
    measured = {name: float(entry["measured"][name]) for name in ("mu", "ci_low", "ci_high")}
    return {
        "name": str(entry["name"]),
        "size": int(entry["size"]),
        "runs": int(entry["runs"]),
        "means": " → ".join(f"{float(mean):.4g}" for mean in entry.get("means", ())),
        "predicted": predicted.mu,
        "predicted_low": low,
        "predicted_high": high,
        "measured": measured["mu"],
        "measured_low": measured["ci_low"],
        "measured_high": measured["ci_high"],
    }


def _agreement(run: Recorded, query: str, frame: pl.DataFrame) -> dict[str, Any] | None:
    if not isinstance(run, Run) or run.sensitivity != "both" or not run.store.has("live"):
        return None
    live = floats(run.influence(query, sensitivity="live")["mu"])
    replay = floats(frame["mu"])
    known = np.flatnonzero(np.isfinite(live) & np.isfinite(replay))
    if len(known) < 3:
        return None
    from scipy.stats import rankdata

    rank = float(np.corrcoef(rankdata(live[known]), rankdata(replay[known]))[0, 1])
    shown = known
    if len(known) > _SCATTER:
        shown = np.sort(np.random.default_rng(0).choice(known, _SCATTER, replace=False))
    text = (
        f"Rank correlation over {len(known):,} samples: {rank:.2f} (Spearman). Live signals look at each step as if "
        "nothing happened after it; the replay follows each step to the end of training and is the one to trust."
    )
    if len(shown) < len(known):
        text += f" {len(shown):,} samples are drawn, chosen at random."
    return {"text": text, "chart": charts.agreement_chart(live[shown], replay[shown])}


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _interval(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"
