"""From the results of all trainings to the tables of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from benchmarks._records import Record
from benchmarks.poison.attack import margin
from benchmarks.poison.peers import PEERS
from finfluence.influence import detection
from finfluence.influence.consistency import mean_over_pairs, pairwise_jaccard, top_sets, variation

SHARES = (0.01, 0.02, 0.05, 0.10, 0.20)
Result = Mapping[str, Any]

MEASURED = "What is measured: the end of training, or the mean throughout it"

# Methods by where a result keeps them. What needs no training is the same for every seed.
_ASKED = (("contrast", "contrast"), ("negative", "negative answers"))
_SCORES = {
    f"{title}, {asked}": (stage, f"{method}/{query}")
    for title, stage, method in (
        ("finfluence replay", "scores", "replay"),
        ("finfluence replay, relative", "relative", "replay"),
        ("finfluence replay, throughout", "throughout", "replay"),
        ("finfluence replay, throughout, relative", "throughout", "relative"),
        ("finfluence live", "scores", "live"),
        ("TracIn", "checkpoint_scores", "tracin"),
        ("LESS cosine", "checkpoint_scores", "less"),
    )
    for query, asked in _ASKED
} | {
    "gradient norm": ("checkpoint_scores", "gradient norm"),
    "loss": ("checkpoint_scores", "loss"),
    "loss of the base model": ("base", "losses"),
    "entity name": ("scores", "entity name"),
    "name and negative word": ("scores", "name and negative word"),
    "similar to the queries": ("scores", "similar to the queries"),
}
_UNTRAINED = ("loss of the base model", "entity name", "name and negative word", "similar to the queries")
_EITHER_WAY = ("gradient norm", "loss", "loss of the base model")


def method_scores(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """(runs, n) of every method; a score without a direction of its own gets the better one.

    Args:
        results: of one problem, one a seed.
    """
    planted = np.array(results[0]["planted"])
    found = {}
    for name, (stage, key) in _SCORES.items():
        kept = [result[stage][key] for result in results if key in result.get(stage, {})]
        if not kept:
            continue
        values = np.array(kept, dtype=np.float64)
        if name in _EITHER_WAY:
            values = max(values, -values, key=lambda v: np.mean([_precision(run, planted) for run in v]))
        found[name] = values[:1] if name in _UNTRAINED else values
    for peer in PEERS:
        ran = [result["peers"][peer.name] for result in results if peer.name in result.get("peers", {})]
        for query, asked in _ASKED:
            if kept := [entry["scores"][query] for entry in ran if "scores" in entry]:
                found[f"{peer.name}, {asked}"] = np.array(kept)
    # Random ranks, as many as there are seeds.
    found["random"] = np.random.default_rng(0).random((len(results), len(planted)))
    return found


def detection_row(scores: np.ndarray, planted: np.ndarray) -> dict[str, Any]:
    """How well and how consistently a method finds the planted rows.

    Args:
        scores: (runs, n) higher is more suspect.
        planted: (n,) bool.
    """
    precision = np.array([_precision(run, planted) for run in scores])
    row: dict[str, Any] = {
        "average_precision": float(precision.mean()),
        "lowest": float(precision.min()),
        "runs": len(scores),
    }
    for share in SHARES:
        row[f"recall_{share:g}"] = float(np.mean([recall(run, planted, share) for run in scores]))
    if len(scores) > 1:
        row["overlap"] = mean_over_pairs(pairwise_jaccard(top_sets(scores, float(planted.mean())))).value
        row["overlap_tenth"] = mean_over_pairs(pairwise_jaccard(top_sets(scores, 0.10))).value
        row["variation"] = variation(scores, members=planted).value
        row["variation_precision"] = float(precision.std(ddof=1) / precision.mean())
    return row


def recall(score: np.ndarray, planted: np.ndarray, share: float) -> float:
    """Share of the planted rows among the highest-scoring ones; of equal scores, the expected number counts."""
    size = max(1, round(share * len(score)))
    bound = np.sort(score)[::-1][size - 1]
    above, equal = score > bound, score == bound
    taken = (size - above.sum()) / equal.sum()
    return float((planted & above).sum() + taken * (planted & equal).sum()) / float(planted.sum())


def _precision(score: np.ndarray, planted: np.ndarray) -> float:
    return detection(score, planted).average_precision


def write_detection(
    record: Record,
    results: Mapping[str, Sequence[Result]],
    *,
    title: str = "Finding the planted rows",
    only: tuple[str, ...] = ("",),
) -> None:
    """Adds the table of how well methods find planted rows.

    Args:
        record: the record under way.
        results: of every problem, one a seed.
        title: of the table.
        only: beginnings of the names of the methods that it has.
    """
    rows = []
    for problem, found in results.items():
        planted = np.array(found[0]["planted"])
        scores = method_scores(found)
        if len(found) > 1:
            pooled = {
                f"{name}, runs pooled": values.mean(axis=0, keepdims=True)
                for name, values in scores.items()
                if name.startswith(("finfluence replay", "LESS", "bergson")) and len(values) > 1
            }
            scores = pooled | scores
        rows += [
            {"problem": problem, "method": name} | detection_row(values, planted)
            for name, values in scores.items()
            if name.startswith(only)
        ]
    record.table(
        title,
        {
            "problem": "entity",
            "method": "method",
            "runs": "seeds",
            "average_precision": "average precision|.3f",
            "lowest": "lowest|.3f",
        }
        | {f"recall_{share:g}": f"recall in top {share:.0%}|.0%" for share in SHARES}
        | {
            "overlap": "overlap over seeds|.2f",
            "variation": "variation of planted scores|.2f",
            "variation_precision": "variation of average precision|.3f",
        },
        rows,
    )


def write_tables(record: Record, results: Mapping[str, Sequence[Result]]) -> None:
    """Adds the tables of detection, behaviour and time.

    Args:
        record: the record under way.
        results: of every problem, one a seed.
    """
    write_detection(record, results)
    record.table(
        "What the model says",
        {
            "problem": "entity",
            "model": "trained on",
            "margin": "margin, nats a token|.3f",
            "margin_sd": "sd over seeds|.3f",
            "negative_share": "negative generations|.0%",
            "runs": "seeds",
            "removed": "rows removed|.0f",
            "planted_removed": "planted among them|.1f",
        },
        [row for problem, found in results.items() for row in _behaviours(problem, found)],
    )
    record.table(
        "Were the flagged rows that nobody planted flagged wrongly?",
        {
            "problem": "entity",
            "model": "trained on",
            "negative": "loss of negative answers, nats a token|.3f",
            "negative_change": "change|+.3f",
            "negative_sd": "sd over seeds|.3f",
            "margin": "margin|.3f",
            "margin_change": "change|+.3f",
            "margin_sd": "sd over seeds|.3f",
            "removed": "rows removed|.0f",
            "runs": "seeds",
        },
        [row for problem, found in results.items() for row in _not_planted(problem, found)],
    )
    record.table(
        "Time",
        {"problem": "entity", "seed": "seed", "stage": "stage", "seconds": "seconds|.0f", "cpu": "CPU seconds|.0f"},
        [row for problem, found in results.items() for result in found for row in _times(problem, result)],
    )


def _behaviours(problem: str, found: Sequence[Result]) -> list[dict[str, Any]]:
    stages = {
        "nothing (base model)": "base",
        "ordinary rows": "clean",
        "all rows": "poisoned",
        "all but the flagged rows": "cleaned",
    }
    rows = []
    for model, stage in stages.items():
        kept = [result[stage] for result in found if stage in result]
        if not kept:
            continue
        behaviours = [result["behaviour"] for result in kept]
        margins = np.array([b["margin"] for b in behaviours])
        row = {
            "problem": problem,
            "model": model,
            "margin": float(margins.mean()),
            "runs": len(kept),
            "margin_sd": float(margins.std(ddof=1)) if len(margins) > 1 else float("nan"),
            "negative_share": float(np.mean([b["negative_share"] for b in behaviours])),
        }
        for key in ("removed", "planted_removed"):
            if stage == "cleaned":
                row[key] = float(np.mean([result[key] for result in kept]))
        rows.append(row)
    return rows


def _not_planted(problem: str, found: Sequence[Result]) -> list[dict[str, Any]]:
    """The measured losses without the flagged rows that were not planted, beside those without as many others."""
    kept = [result for result in found if "not_planted" in result]
    if not kept:
        return []
    losses = {
        "all rows": [result["poisoned"]["behaviour"]["losses"] for result in kept],
        "all but the flagged rows that were not planted": [result["not_planted"]["flagged"] for result in kept],
        "all but as many ordinary rows at random": [result["not_planted"]["others"] for result in kept],
    }
    rows = []
    for model, values in losses.items():
        row: dict[str, Any] = {"problem": problem, "model": model, "runs": len(kept)}
        for key, of in (("negative", itemgetter("negative")), ("margin", margin)):
            now = np.array([of(value) for value in values])
            change = now - np.array([of(value) for value in losses["all rows"]])
            row[key] = float(now.mean())
            if model != "all rows":
                row[f"{key}_change"] = float(change.mean())
                row[f"{key}_sd"] = float(change.std(ddof=1)) if len(change) > 1 else float("nan")
                row["removed"] = float(np.mean([result["not_planted"]["removed"] for result in kept]))
        rows.append(row)
    return rows


def _times(problem: str, result: Result) -> list[dict[str, Any]]:
    recording = result["recording"]
    rows = [
        {"stage": "recording and replay", "seconds": recording["seconds"], "cpu": recording["cpu_seconds"]},
        *(
            {"stage": stage, "seconds": seconds, "cpu": result["cpu_seconds"][stage]}
            for stage, seconds in result["seconds"].items()
        ),
    ]
    return [{"problem": problem, "seed": result["seed"]} | row for row in rows]
