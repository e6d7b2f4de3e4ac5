"""`finfluence doctor`: is a training recorded correctly, and can it be replayed?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finfluence.errors import InputError

if TYPE_CHECKING:
    from finfluence.workflows.doctor import Check


def findings(path: Path) -> Iterator[Check]:
    """The findings about a configuration file or a run directory.

    Raises:
        InputError: it is neither.
    """
    from finfluence.workflows.doctor import diagnose

    if path.is_dir():
        from finfluence.runs import open_run
        from finfluence.workflows.health import recorded_health
        from finfluence.workflows.recipes import load_recipe

        if not (path / "run.json").is_file():
            raise InputError(f"{path} is a directory without a run; give a run or a configuration file")
        run = open_run(path, partial=True)
        yield from recorded_health(run)
        reference = run.manifest.get("recipe")
        if not reference:
            print("The run carries no recipe, so its model cannot be examined.", file=sys.stderr)
            return
        if reference["function"].startswith("finfluence.workflows.finetuning:"):
            _prepare_loading()
        print("Examining the model on its first batch ...", file=sys.stderr)
        replay = run.manifest.get("replay", {}).get("options", {})
        yield from diagnose(
            load_recipe(reference), sensitivity=run.sensitivity, hessian=replay.get("hessian", "one-sided")
        )
        return
    _prepare_loading()
    from finfluence.workflows.configuration import read_configuration
    from finfluence.workflows.finetuning import prepare

    work = prepare(read_configuration(path))
    print(f"{work.describe()}\nExamining the model on its first batch ...", file=sys.stderr)
    options = work.configuration.sensitivity
    yield from diagnose(work.recipe, sensitivity=options.kind, hessian=options.hessian)


def doctor(
    path: Annotated[Path, typer.Argument(help="YAML configuration of `finfluence train`, or a run directory.")],
    format: Annotated[str, typer.Option(help="text, or json (lines).")] = "text",
) -> None:
    """Examine a configuration before training, or a run after it, and say which settings are unsafe.

    Exit status 0: nothing unsafe; 1: something is; 2: bad input.

    Example: finfluence doctor recipes/smollm2-135m-lora.yaml
    """
    if format not in ("text", "json"):
        raise InputError(f"unknown format {format!r}; choose text or json")
    counts: dict[str, int] = {}
    for check in findings(path):
        counts[check.verdict] = counts.get(check.verdict, 0) + 1
        print(json.dumps(vars(check)) if format == "json" else check, flush=True)
    if format == "text":
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        print(f"{words}.")
    if counts.get("unsafe"):
        raise typer.Exit(1)


def _prepare_loading() -> None:
    from finfluence.integrations.models import quiet_loading, require_transformers

    require_transformers()
    quiet_loading()
