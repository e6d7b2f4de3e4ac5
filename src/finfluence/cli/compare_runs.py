"""`finfluence compare-runs`: do other seeds give the same answer?"""

from __future__ import annotations

from typing import Annotated, Any, cast

import polars as pl
import typer

from finfluence.cli._output import Format, print_table, write_frame
from finfluence.errors import InputError
from finfluence.tradeoff import SIGN_CONVENTION
from finfluence.workflows.comparison import compare_runs as compare


def _shares(text: str) -> list[float]:
    """Shares from percentages separated by commas, with or without a percent sign.

    Raises:
        InputError: something that is not a number in (0, 100].
    """
    shares = []
    for word in text.split(","):
        try:
            percent = float(word.strip().removesuffix("%"))
        except ValueError:
            raise InputError(f"--top takes percentages such as 1,5,10; got {word.strip()!r}") from None
        if not 0 < percent <= 100:
            raise InputError(f"--top takes percentages above 0 and at most 100; got {word.strip()!r}")
        shares.append(percent / 100)
    return shares


def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Two or more run directories or fsspec URLs, other seeds.")],
    query: Annotated[
        str | None, typer.Option(help='Query to compare on; "self" for self-influence; may be left out if one.')
    ] = None,
    top: Annotated[str, typer.Option(help="Percentages of the samples whose top sets are compared.")] = "1,5,10",
    fdr: Annotated[float, typer.Option(help="False-discovery rate at which a run flags a sample.")] = 0.05,
    effect: Annotated[
        str | None, typer.Option(help="harmful (default) or supporting (default for self-influence).")
    ] = None,
    known: Annotated[
        str | None, typer.Option(help="Column of the sample table that marks rows known to be bad.")
    ] = None,
    sensitivity: Annotated[str, typer.Option(help="run, or live for the live signals beside a replay.")] = "run",
    format: Annotated[str, typer.Option(help="table, csv, json (lines) or parquet: the figures.")] = "table",
) -> None:
    """Consistency over seeds: the same training recorded again, what stays the same and is it right?

    Example: finfluence compare-runs runs/seed1 runs/seed2 runs/seed3 --known planted
    """
    if format not in ("table", "csv", "json", "parquet"):
        raise InputError(f"unknown format {format!r}; choose table, csv, json or parquet")
    found = compare(
        runs,
        query,
        top=_shares(top),
        fdr=fdr,
        effect=cast(Any, effect),
        known=known,
        sensitivity=cast(Any, sensitivity),
    )
    if format != "table":
        write_frame(found.frame, cast(Format, format))
        return
    print(SIGN_CONVENTION)
    ends = [
        "–" if low is None else f"{low:.3f} to {high:.3f}"
        for low, high in found.frame.select("ci_low", "ci_high").iter_rows()
    ]
    shown = found.frame.select("measure", "set", "value", pl.Series("interval", ends), "meaning")
    print_table(shown, title=f"{len(runs)} runs on {found.query!r}, {found.effect} samples")
    flagged = int((found.samples["flagged_by"] > 0).sum())
    print(
        f"{len(found.agreed)} samples are flagged by every run, {flagged} by at least one "
        f"(false-discovery rate {fdr:g})."
    )
