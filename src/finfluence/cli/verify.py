"""`finfluence verify`: is a finding real? Retrain with and without the samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from finfluence.cli.score import choose_query, read_ids
from finfluence.errors import InputError


def verify(
    run: Annotated[str, typer.Argument(help="Directory of a run recorded with a recipe, e.g. by the demo.")],
    subset: Annotated[
        Path | None, typer.Option(help="File of sample ids to remove (one a line, or a 'sample' column).")
    ] = None,
    flagged: Annotated[
        bool, typer.Option("--flagged", help="Remove the samples that are harmful at a false-discovery rate of 5 %.")
    ] = False,
    query: Annotated[str | None, typer.Option(help="Query; may be left out where there is one.")] = None,
    runs: Annotated[int, typer.Option(help="Retrainings an arm at most.")] = 64,
    executor: Annotated[str, typer.Option(help="ensemble (small models), processes or ray.")] = "ensemble",
    precision: Annotated[
        float | None, typer.Option(help="Stop when the 95 % interval of the measured mu is narrower than this.")
    ] = None,
) -> None:
    """Retrain with and without a subset and print predicted mu beside measured mu, both with intervals.

    Example: finfluence verify runs/demo --flagged --precision 0.8
    """
    from finfluence.runs import open_run
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.verification import Verification, flagged_samples
    from finfluence.workflows.verification import verify as verify_subset

    if executor not in ("ensemble", "processes", "ray"):
        raise InputError(f"unknown executor {executor!r}; choose ensemble, processes or ray")
    if (subset is None) == (not flagged):
        raise InputError("say which samples to remove: --subset FILE, or --flagged (one of them)")
    opened = open_run(run)
    name = choose_query(opened, query)
    ids = flagged_samples(opened, name) if subset is None else read_ids(subset, opened)
    state: Verification | None = None
    for state in verify_subset(
        opened,
        ids,
        query=name,
        runs=runs,
        precision=precision,
        executor=cast(Any, executor),
        progress=sys.stderr.isatty(),
    ):
        low, high = state.measured_interval
        print(
            f"{state.runs} retrainings an arm: measured μ = {state.measured.mu:+.2f} (95 % {low:+.2f} to {high:+.2f})",
            file=sys.stderr,
        )
    assert state is not None
    print(SIGN_CONVENTION)
    print(state)
