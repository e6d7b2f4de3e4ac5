"""`finfluence report`: a recorded run as one HTML page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finfluence.runs.run import open_run


def report(
    run: Annotated[str, typer.Argument(help="Run directory or fsspec URL.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; report.html in the run by default.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="Show this query alone; by default all that fit.")] = None,
) -> None:
    """Write a run as one HTML page that works offline: ranking, groups, removal curve, checks.

    Example: finfluence report runs/demo --output report.html
    """
    from finfluence.workflows.report import write_report

    opened = open_run(run)
    print(f"Writing the report of {run} ...", file=sys.stderr)
    path = write_report(opened, output, query=query)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
