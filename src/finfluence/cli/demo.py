"""`finfluence demo`: the main job on real data, with one command."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import polars as pl
import typer

from finfluence.cli._output import print_table


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
    """Find flipped labels: train on handwritten digits, record one run, print the most harmful samples.

    Example: finfluence demo --output runs/demo
    """
    from finfluence.runs import train
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.demo import detection_scores
    from finfluence.workflows.digits import digits

    began = time.perf_counter()
    directory = output or free_directory(Path("runs/demo"))
    recipe = digits(samples=250, epochs=10) if quick else digits(epochs=12, batch_size=50)
    plan = recipe.plan
    n, planted = len(recipe.dataset), 0 if recipe.samples is None else int(recipe.samples["planted"].sum())
    print(
        f"Training a small network on {n} handwritten digits, {planted} of them with a wrong label, "
        f"and recording one run in {directory} ...",
        file=sys.stderr,
    )
    run = train(
        recipe.task,
        recipe.make_model(plan.seed),
        recipe.dataset,
        queries=recipe.queries,
        optimizer=plan.optimizer,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        seed=plan.seed,
        sensitivity="both",
        samples=recipe.samples,
        recipe=recipe.reference,
        directory=directory,
    )
    influence = run.influence("validation", alternative="harmful")
    labelled = influence.join(run.samples(), on="sample", maintain_order="left")
    print(SIGN_CONVENTION)
    shown = (
        labelled.sort("mu")
        .head(15)
        .select("sample", "mu", "ci_low", "ci_high", "q_value", "label", "true_label", "planted")
    )
    print_table(shown, title="Most harmful training samples for the validation loss")
    flagged = labelled.filter(pl.col("q_value") <= 0.05)
    right = int(flagged["planted"].sum())
    print(
        f"{flagged.height} samples are harmful at a false-discovery rate of 5 %; {right} of them planted, of {planted}."
    )
    for name, scores in detection_scores(run, "validation").items():
        print(f"{name:>6} signals: AUROC {scores.auroc:.3f}, average precision {scores.average_precision:.3f}")
    print(
        f"Took {time.perf_counter() - began:.0f} s. The run is in {directory}; next:\n"
        f"  finfluence score {directory} --group label    influence of every label's samples\n"
        f"  finfluence verify {directory} --flagged       retrain without the flagged samples: is it true?"
    )
