"""`finfluence verify`: is a finding real? Retrain with and without the samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from finfluence.cli.score import choose_query, read_ids
from finfluence.errors import InputError


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
    Another: finfluence verify runs/demo --curve 10,50,recommended --runs 16
    """
    from finfluence.runs import open_runs
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.cleaning import clean
    from finfluence.workflows.verification import Chosen, Verification, curve_points
    from finfluence.workflows.verification import verify as verify_subset

    if executor not in (None, "ensemble", "processes", "ray"):
        raise InputError(f"unknown executor {executor!r}; choose ensemble, processes or ray")
    if (subset is not None) + flagged + (curve is not None) != 1:
        raise InputError("say which samples to remove: --subset FILE, --flagged or --curve K,K,... (one of them)")
    opened = open_runs(run)
    name = choose_query(opened, query)
    chosen: list[Any]
    if subset is not None:
        chosen = [read_ids(subset, opened)]
    elif flagged:
        chosen = [Chosen.of(clean(opened, name))]
    else:
        chosen = curve_points(opened, name, _points(curve or ""), effect=cast(Any, effect))
    states: list[Verification] = []
    for ids in chosen:
        state: Verification | None = None
        for state in verify_subset(
            opened,
            ids,
            name=subset.stem if subset else "flagged",
            query=name,
            runs=runs,
            precision=precision,
            executor=cast(Any, executor),
            progress=sys.stderr.isatty(),
        ):
            low, high = state.measured_interval
            print(
                f"{state.name}, {state.runs} pairs of retrainings: measured μ = {state.measured.mu:+.2f} "
                f"(95 % {low:+.2f} to {high:+.2f})",
                file=sys.stderr,
            )
        assert state is not None
        states.append(state)
    print(SIGN_CONVENTION)
    for state in states:
        print(state)


def _points(text: str) -> list[int | Literal["recommended"]]:
    points: list[int | Literal["recommended"]] = []
    for word in text.replace(" ", "").split(","):
        if word != "recommended" and not word.isdigit():
            raise InputError(f"--curve takes numbers of rows such as 10,50,200 or recommended, got {word!r}")
        points.append("recommended" if word == "recommended" else int(word))
    return points
