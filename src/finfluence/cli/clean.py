"""`finfluence clean`: the training file without the rows that should go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from finfluence.cli._output import print_table
from finfluence.cli.score import choose_query
from finfluence.errors import InputError


def clean(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run directory or fsspec URL; several are averaged.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New file for the kept rows: .jsonl, .csv or .parquet, as the input.")
    ],
    query: Annotated[str | None, typer.Option(help="Query; may be left out where there is one.")] = None,
    effect: Annotated[
        str, typer.Option(help="Drop harmful rows (their removal lowers the measurement) or supporting ones.")
    ] = "harmful",
    fdr: Annotated[
        float | None, typer.Option(help="Expected share of false discoveries among the dropped rows; 0.05 by default.")
    ] = None,
    top: Annotated[
        str | None, typer.Option(help="Drop the K strongest, or 'recommended': the rows that stand out.")
    ] = None,
    budget_type_1: Annotated[
        float | None, typer.Option(help="Drop what a test with this type-I error ...", metavar="ALPHA")
    ] = None,
    budget_type_2: Annotated[
        float | None, typer.Option(help="... would detect with at most this type-II error.", metavar="BETA")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Test and drop whole groups by this column of the sample table.")
    ] = None,
    correction: Annotated[
        str, typer.Option(help="bh (Benjamini-Hochberg), or by (Benjamini-Yekutieli: any dependence).")
    ] = "bh",
    relative: Annotated[
        bool, typer.Option(help="With --top K: the strongest by relative influence, which are about the query.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Copy of the training file, if it is not where it was.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of that file that names samples.")] = None,
) -> None:
    """Write the training file without harmful rows, the dropped rows beside it, and what the cut is predicted to do.

    Several runs of one training under other seeds are averaged: what goes is what they agree on.

    Example: finfluence clean runs/demo --query validation --effect harmful --fdr 0.05 -o cleaned.jsonl
    """
    from finfluence.runs.pooling import open_runs
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows._cut_files import check_target, source_of
    from finfluence.workflows.cleaning import clean as choose

    if (budget_type_1 is None) != (budget_type_2 is None):
        raise InputError("an error budget has two sides: give --budget-type-1 and --budget-type-2")
    budget = None if budget_type_1 is None or budget_type_2 is None else (budget_type_1, budget_type_2)
    opened = open_runs(runs)
    name = choose_query(opened, query)
    file = None if data is None else str(data)
    source = source_of(opened, data=file, id_column=id_column)
    check_target(output, source=source.path if source else None)
    cleaning = choose(
        opened,
        name,
        effect=cast(Any, effect),
        fdr=fdr,
        top=_number(top),
        budget=budget,
        group=group,
        correction=cast(Any, correction),
        data=file,
        id_column=id_column,
        relative=relative,
    )
    written = cleaning.write(output)
    print(SIGN_CONVENTION)
    if not written:
        print(f"{cleaning}\nNothing was written.")
        return
    shown = cleaning.dropped.drop("reason")
    print_table(shown.head(10), title=f"Dropped, the most {cleaning.effect} first")
    if shown.height > 10:
        print(f"… and {shown.height - 10} more, all in {written[1]}")
    print(cleaning)
    print(f"Kept rows: {written[0]} ({len(cleaning.kept)}). Dropped rows with their figures: {written[1]}.")


def _number(top: str | None) -> Any:
    if top is None or top == "recommended":
        return top
    if not top.isdigit():
        raise InputError(f"unknown number of rows to drop {top!r}; give --top K with a whole number, or recommended")
    return int(top)
