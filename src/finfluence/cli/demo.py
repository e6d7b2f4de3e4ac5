"""`finfluence demo`: the main job on real data, with one command: record, find, read, cut, predict, verify."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from finfluence.cli._output import print_table

if TYPE_CHECKING:
    from finfluence.workflows.cleaning import Cleaning


def free_directory(base: Path) -> Path:
    """`base`, or `base-2`, `base-3`, … where it is taken."""
    candidate, number = base, 2
    while candidate.exists():
        candidate = base.with_name(f"{base.name}-{number}")
        number += 1
    return candidate


def demo(
    output: Annotated[Path | None, typer.Option(help="Run directory to write; runs/demo by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the data and half of the epochs.")] = False,
) -> None:
    """Find flipped labels in handwritten digits and fix them: record one run, cut harmful rows, check by retraining.

    Example: finfluence demo --output runs/demo
    """
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.cleaning import clean
    from finfluence.workflows.demo import detection_scores, held_out_accuracy
    from finfluence.workflows.digits import digits
    from finfluence.workflows.verification import curve_points, verify

    began = time.perf_counter()
    directory = output or free_directory(Path("runs/demo"))
    recipe = digits(samples=250, epochs=10) if quick else digits(epochs=12, batch_size=50)
    n, planted = len(recipe.dataset), 0 if recipe.samples is None else int(recipe.samples["planted"].sum())
    _say(f"1 record and replay: a small network on {n} handwritten digits, {planted} of them with a wrong label")
    run = recipe.train(directory, sensitivity="both")
    print(SIGN_CONVENTION)
    flagged = clean(run, "validation", fdr=0.05)
    cut = clean(run, "validation", top="recommended")
    if cut.dropped.is_empty():  # a small run may hold no clear case
        cut = clean(run, "validation", top=planted)
    columns = ("sample", "mu", "ci_low", "ci_high", "q_value", "label", "true_label", "planted")
    print_table(cut.dropped.head(10).select(columns), title="Most harmful training samples for the validation loss")
    for name, scores in detection_scores(run, "validation").items():
        print(f"{name:>6} signals: AUROC {scores.auroc:.3f}, average precision {scores.average_precision:.3f}")
    print(
        f"{flagged.dropped.height} samples are harmful at a false-discovery rate of 5 %; "
        f"{_planted(flagged)} of them planted, of {planted}.\n"
        f"The recommended cut is {cut.dropped.height} rows, {_planted(cut)} of them planted: rows that stand out. "
        "The others bring little each."
    )
    _say("2 clean: write the data without the recommended cut")
    written = cut.write(directory / "cleaned.csv")
    print(cut)
    _say("3 verify: retrain with and without points of the removal curve")
    k = cut.dropped.height
    points = sorted({max(1, k // 5), max(1, k // 2)} - {k})
    states = [
        list(verify(run, point, query="validation", recipe=recipe, runs=16 if quick else 32, progress=False))[-1]
        for point in [*curve_points(run, "validation", points), cut]
    ]
    _say("4 retrain on the cleaned data, judged on images that neither training nor the query has seen")
    removed = np.flatnonzero(run.samples()["sample"].is_in(cut.dropped["sample"].implode()).to_numpy())
    before, after = held_out_accuracy(recipe, np.empty(0, dtype=np.int64)), held_out_accuracy(recipe, removed)
    _say("5 report")
    report = run.report()

    print(f"Predicted from one run, and measured by {states[-1].runs} pairs of retrainings:")
    for state in states:
        (low, high), (m_low, m_high) = state.predicted.interval(0.95), state.measured_interval
        print(
            f"  without the {state.name:<18} predicted μ = {state.predicted.mu:+7.2f} ({low:+.2f} to {high:+.2f})   "
            f"measured μ = {state.measured.mu:+7.2f} ({m_low:+.2f} to {m_high:+.2f})"
        )
    error = float(np.std(after - before, ddof=1) / np.sqrt(len(before)))
    print(
        f"Test accuracy: {before.mean():.1%} before, {after.mean():.1%} after cleaning "
        f"(mean of {len(before)} pairs of retrainings; change {100 * (after - before).mean():+.1f} ± {100 * error:.1f} "
        "points, standard error)."
    )
    print(f"Cleaned data: {written[0]}; dropped rows: {written[1]}.")
    print(f"Report: {report}  (took {time.perf_counter() - began:.0f} s)")


def _planted(cleaning: Cleaning) -> int:
    return int(cleaning.dropped["planted"].sum())


def _say(text: str) -> None:
    print(text, file=sys.stderr)
