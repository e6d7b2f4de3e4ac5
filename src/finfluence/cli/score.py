"""`finfluence score`: influence of samples, groups or a subset of a recorded run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import polars as pl
import typer

from finfluence.cli._output import Format, print_table, write_frame
from finfluence.errors import InputError
from finfluence.runs.pooling import PooledRuns, Recorded, check_query, open_runs
from finfluence.runs.run import Run, RunEstimator
from finfluence.tradeoff import SIGN_CONVENTION
from finfluence.workflows.removal import large_groups_note


def read_ids(path: Path, run: Recorded) -> list[Any]:
    """Sample ids from a file: one a line, or the column "sample" of a CSV, JSON-lines or Parquet file.

    Raises:
        InputError: the file cannot be read, has no ids, or ids of another type than the run's.
    """
    try:
        if path.suffix in (".csv", ".jsonl", ".ndjson", ".parquet"):
            readers = {".csv": pl.read_csv, ".parquet": pl.read_parquet}
            frame = readers.get(path.suffix, pl.read_ndjson)(path)
            if "sample" not in frame.columns:
                raise InputError(f"{path} has no column 'sample' (columns: {', '.join(frame.columns)})")
            ids: list[Any] = frame["sample"].to_list()
        else:
            ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise InputError(f"cannot read the subset file {path}: {error}") from error
    if not ids:
        raise InputError(f"the subset file {path} holds no ids; write one sample id a line")
    if run.samples()["sample"].dtype == pl.String:
        return [str(i) for i in ids]
    try:
        return [int(i) for i in ids]
    except (TypeError, ValueError):
        wrong = next(i for i in ids if not str(i).lstrip("-").isdigit())
        raise InputError(f"{path} holds the id {wrong!r}, but the run's ids are integers") from None


def choose_query(run: Recorded, query: str | None) -> str:
    """The query that was asked for, or the run's only one."""
    if query is not None:
        return check_query(run, query)
    if len(run.queries) == 1:
        return run.queries[0]
    raise InputError(f"the run has several queries; choose one with --query: {', '.join(run.queries)}")


def score(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run directory or fsspec URL; several are averaged.")
    ],
    query: Annotated[str | None, typer.Option(help="Query to score; may be left out where there is one.")] = None,
    group: Annotated[str | None, typer.Option(help="Column of the sample table to group by.")] = None,
    subset: Annotated[
        Path | None,
        typer.Option(help="File of sample ids (one a line, or a 'sample' column): score them as one subset."),
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="gaussian, tracin, max, median, two-stage-gaussian or clopper-pearson.")
    ] = "gaussian",
    format: Annotated[str, typer.Option(help="table, csv, json (lines) or parquet.")] = "table",
    top: Annotated[int, typer.Option(help="Rows of the table; other formats have all rows.")] = 20,
    sensitivity: Annotated[str, typer.Option(help="run, or live for the live signals beside a replay.")] = "run",
    relative: Annotated[
        bool, typer.Option(help="Also μ at the median length of gradient, and sort by it: rows about the query first.")
    ] = False,
    effect: Annotated[str, typer.Option(help="Which rows come first: harmful, or supporting.")] = "harmful",
    leave_out: Annotated[
        bool,
        typer.Option(
            "--leave-out",
            help="With --group or --subset: train along the recorded path without each, one training apiece, instead "
            "of adding up single samples. For large or coherent groups.",
        ),
    ] = False,
) -> None:
    """Influence of every sample, of groups, or of one subset, in units of training noise.

    Several runs of one training under other seeds are averaged, and the standard error holds what they differ by.

    Example: finfluence score runs/demo --query validation --group label

    Example: finfluence score runs/demo --group label --leave-out
    """
    if format not in ("table", "csv", "json", "parquet"):
        raise InputError(f"unknown format {format!r}; choose table, csv, json or parquet")
    if effect not in ("harmful", "supporting"):
        raise InputError(f"unknown effect {effect!r}; choose harmful or supporting")
    opened = open_runs(runs)
    name = choose_query(opened, query)
    if subset is not None and group is not None:
        raise InputError("give --subset or --group, not both")
    subsets = None if subset is None else {subset.stem: read_ids(subset, opened)}
    options: dict[str, Any] = {"subsets": subsets, "groups": group, "relative": relative}
    if leave_out:
        if relative or estimator != "gaussian" or sensitivity != "run":
            raise InputError("--leave-out measures μ itself; it takes no --relative, --estimator or --sensitivity")
        frame = _left_out(opened, name, subsets, group)
    elif isinstance(opened, PooledRuns):
        if estimator != "gaussian" or sensitivity != "run":
            raise InputError("several runs are averaged with the gaussian estimator, each by its own signals")
        frame = opened.influence(name, **options)
    else:
        frame = opened.influence(
            name, estimator=cast(RunEstimator, estimator), sensitivity=cast(Any, sensitivity), **options
        )
    if format != "table":
        write_frame(frame, cast(Format, format))
        return
    if "sample" in frame.columns:
        about = opened.samples().select(pl.col("sample"), pl.exclude("sample", "content_hash", *frame.columns))
        frame = frame.join(about, on="sample", how="left", maintain_order="left")
    if group is not None and (blank := opened.samples()[group].null_count()):
        print(f"{blank} samples have no {group!r} and are in no group.", file=sys.stderr)
    order = "relative" if relative else "mu"
    if leave_out:
        frame = frame.drop("se", "p_value", "unit", "measured_with")
    if relative:
        frame = frame.select("sample", "relative", pl.exclude("sample", "relative"))
    ordered = frame.sort(order, descending=effect == "supporting", nulls_last=True)
    print(SIGN_CONVENTION)
    of = ", relative to the gradient's length" if relative else ""
    of += f", {len(runs)} runs averaged" if len(runs) > 1 else ""
    of += ", each left out along the recorded path" if leave_out else ""
    print_table(ordered.head(top), title=f"Influence on {name!r}{of}, most {effect} first")
    if leave_out:
        print(
            "first order: μ of the single samples, added up. measured without: the measurement after such a training."
        )
    elif "size" in frame.columns and (note := large_groups_note(ordered, opened.samples().height)):
        print(note)
    if frame.height > top:
        print(
            f"… and {frame.height - top} more; --top N shows more, --format csv|json|parquet gives all.",
            file=sys.stderr,
        )


def _left_out(opened: Recorded, query: str, subsets: dict[str, Any] | None, group: str | None) -> pl.DataFrame:
    """The frame of `finfluence.leave_out`, one query's rows.

    Raises:
        InputError: neither groups nor a subset, or several runs.
    """
    if subsets is None and group is None:
        raise InputError("--leave-out is for groups: give --group COLUMN or --subset FILE")
    if not isinstance(opened, Run):
        raise InputError("--leave-out goes along one recorded path; give one run")
    return opened.leave_out(subsets=subsets, groups=group).filter(pl.col("query") == query).drop("query")
