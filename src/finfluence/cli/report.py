"""`finfluence report`: a recorded run, or several as one, as one HTML page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finfluence.runs.pooling import open_runs


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run directory or fsspec URL; several are averaged and compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML file to write; by default report.html in the run, or beside several runs."
        ),
    ] = None,
    query: Annotated[str | None, typer.Option(help="Show this query alone; by default all that fit.")] = None,
) -> None:
    """Write a run as one HTML page that works offline: ranking, groups, removal curve, checks.

    Of several runs of one training under other seeds it also shows what each says, and how far they agree.

    Example: finfluence report runs/demo --output report.html
    """
    from finfluence.workflows.report import write_report

    opened = open_runs(runs)
    print(f"Writing the report of {', '.join(runs)} ...", file=sys.stderr)
    path = write_report(opened, output, query=query)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
