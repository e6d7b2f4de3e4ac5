"""`finfluence verify`: is a finding real? Retrain with and without the samples."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import polars as pl
import typer

from finfluence.cli._output import print_table
from finfluence.cli.score import choose_query, read_ids
from finfluence.errors import InputError

if TYPE_CHECKING:
    from finfluence.workflows.verification import Verification


def verify(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Directory of a run recorded with a recipe, e.g. by the demo; several predict as one, "
            "and the first is trained again.",
        ),
    ],
    subset: Annotated[
        Path | None, typer.Option(help="File of sample ids to remove (one a line, or a 'sample' column).")
    ] = None,
    flagged: Annotated[
        bool, typer.Option("--flagged", help="Remove the samples that are harmful at a false-discovery rate of 5 %.")
    ] = False,
    curve: Annotated[
        str | None,
        typer.Option(help="Points of the removal curve: remove the K most harmful, for each of these, e.g. 10,50,200."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column of the sample table: without each of its groups, one after the other.")
    ] = None,
    effect: Annotated[str, typer.Option(help="With --curve: harmful or supporting rows first.")] = "harmful",
    query: Annotated[str | None, typer.Option(help="Query; may be left out where there is one.")] = None,
    runs: Annotated[int, typer.Option(help="Pairs of retrainings, with and without, at most.")] = 32,
    executor: Annotated[
        str | None,
        typer.Option(help="ensemble (small models), processes or ray; what suits the run's model by default."),
    ] = None,
    precision: Annotated[
        float | None, typer.Option(help="Stop when the 95 % interval of the measured mu is narrower than this.")
    ] = None,
) -> None:
    """Retrain with and without a subset and print predicted mu beside measured mu, both with intervals.

    Example: finfluence verify runs/demo --flagged --precision 0.8

    Example: finfluence verify runs/demo --curve 10,50,recommended --runs 16

    Example: finfluence verify runs/demo --group label --runs 8
    """
    from finfluence.runs import open_runs
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.cleaning import clean
    from finfluence.workflows.verification import Chosen, curve_points, group_points, verify_together
    from finfluence.workflows.verification import verify as verify_subset

    if executor not in (None, "ensemble", "processes", "ray"):
        raise InputError(f"unknown executor {executor!r}; choose ensemble, processes or ray")
    if (subset is not None) + flagged + (curve is not None) + (group is not None) != 1:
        raise InputError(
            "say which samples to remove: --subset FILE, --flagged, --curve K,K,... or --group COLUMN (one of them)"
        )
    opened = open_runs(run)
    name = choose_query(opened, query)
    options: dict[str, Any] = {"query": name, "runs": runs, "precision": precision, "executor": executor}
    options["progress"] = sys.stderr.isatty()
    steps: Iterable[list[Verification]]
    if subset is not None:
        found = verify_subset(opened, read_ids(subset, opened), name=subset.stem, **options)
        steps = ([state] for state in found)
    else:
        if flagged:
            chosen = [Chosen.of(clean(opened, name))]
        elif group is not None:
            chosen = group_points(opened, name, group)
        else:
            chosen = curve_points(opened, name, _points(curve or ""), effect=cast(Any, effect))
        steps = verify_together(opened, chosen, **options)
    states: list[Verification] = []
    for states in steps:
        print(_so_far(states), file=sys.stderr)
    print(SIGN_CONVENTION)
    if len(states) == 1:
        print(states[0])
    else:
        _print_several(states)


def _so_far(states: list[Verification]) -> str:
    """One line for people who wait."""
    if len(states) == 1:
        (low, high), mu = states[0].measured_interval, states[0].measured.mu
        return (
            f"{states[0].name}, {states[0].runs} pairs of retrainings: measured μ = {mu:+.2f} (95 % {_span(low, high)})"
        )
    widest = max(high - low for low, high in (state.measured_interval for state in states))
    return (
        f"{len(states)} subsets, {states[0].runs} pairs of retrainings each: the widest 95 % interval is {widest:.2f}"
    )


def _print_several(states: list[Verification]) -> None:
    rows = [
        {
            "removed": state.name,
            "rows": f"{state.size:,}",
            "predicted": f"{state.predicted.mu:+.3g}",
            "95 %": _span(*state.predicted.interval(0.95), digits=".3g"),
            "measured": f"{state.measured.mu:+.3g}",
            "95 % ": _span(*state.measured_interval, digits=".3g"),
            "mean": f"{state.means[1]:.4g}",
            "": "" if state.agrees else "≠",
        }
        for state in states
    ]
    source = "the recorded run" if states[0].recordings == 1 else f"{states[0].recordings} recorded runs"
    pairs = f"{states[0].runs} pairs of retrainings"
    print_table(pl.DataFrame(rows), title=f"μ on {states[0].query!r}, predicted from {source} and measured by {pairs}")
    print(f"mean: of the measurement, retrained without them; with all samples it is {states[0].means[0]:.4g}.")
    apart = sum(not state.agrees for state in states)
    print(
        f"{len(states) - apart} of {len(states)} predictions agree with retraining within both errors"
        + ("; where they do not (≠), retraining is right." if apart else ".")
    )


def _span(low: float, high: float, digits: str = ".2f") -> str:
    return f"{low:+{digits}} to {high:+{digits}}"


def _points(text: str) -> list[int | Literal["recommended"]]:
    points: list[int | Literal["recommended"]] = []
    for word in text.replace(" ", "").split(","):
        if word != "recommended" and not word.isdigit():
            raise InputError(f"--curve takes numbers of rows such as 10,50,200 or recommended, got {word!r}")
        points.append("recommended" if word == "recommended" else int(word))
    return points
