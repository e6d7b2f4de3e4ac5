"""`finfluence train`: fine-tune a language model by a configuration file, recorded."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finfluence.errors import InputError

if TYPE_CHECKING:
    from finfluence.workflows.configuration import Configuration


def find_configuration(path: Path) -> tuple[Configuration, Path | None]:
    """The configuration in a file, or the one that a run directory was made from, with that directory.

    Raises:
        InputError: neither a configuration nor a run of one.
    """
    from finfluence.workflows.configuration import read_configuration
    from finfluence.workflows.finetuning import recorded_configuration

    if not path.is_dir():
        return read_configuration(path), None
    manifest = path / "run.json"
    if not manifest.is_file():
        raise InputError(f"{path} is a directory without a run; give a configuration file, e.g. {path}/config.yaml")
    found = recorded_configuration(json.loads(manifest.read_text(encoding="utf-8")))
    if found is None:
        raise InputError(f"{path} holds a run that `finfluence train` did not make; give a configuration file")
    return found, path


def train(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration (see recipes/), or the directory of a run to --resume.")
    ],
    output: Annotated[
        str | None, typer.Option(help="Run directory to write; the configuration's own, else runs/NAME, by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, time two steps, print the plan; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted or killed.")] = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds, e.g. 1,2,3: one run each in OUTPUT/seed-1, ..., for score and clean to average."),
    ] = None,
) -> None:
    """Fine-tune a language model and record which examples move it.

    Example: finfluence train recipes/smollm2-135m-lora.yaml --output runs/a --dry-run

    Example: finfluence train recipes/smollm2-135m-lora.yaml --output runs/lm --seeds 1,2,3
    """
    from finfluence.integrations.models import quiet_loading, require_transformers

    require_transformers()
    from finfluence.tradeoff import SIGN_CONVENTION
    from finfluence.workflows.finetuning import CONFIGURATION_FILE, check_free, prepare

    configuration, own = find_configuration(config)
    if own is not None and not (resume or dry_run or output):
        raise InputError(f"{own} already holds a run; add --resume to go on with it, or --output DIR to repeat it")
    name = config.stem if config.stem != "config" else "train"
    directory = output or (str(own) if own is not None else configuration.output) or f"runs/{name}"
    chosen = {directory: configuration}
    if seeds is not None:
        if own is not None and output is None:
            raise InputError("runs of several seeds need a directory beside this run's; add --output DIR")
        chosen = {
            f"{directory.rstrip('/')}/seed-{seed}": configuration.model_copy(
                update={"training": configuration.training.model_copy(update={"seed": seed})}
            )
            for seed in _seeds(seeds)
        }
    quiet_loading()
    if dry_run:
        from finfluence.workflows.rehearsal import rehearse

        work = prepare(next(iter(chosen.values())))
        print(work.describe(), file=sys.stderr)
        each = f", one of {len(chosen)} alike" if len(chosen) > 1 else ""
        print(f"Plan of a run in {next(iter(chosen))} (sensitivity {configuration.sensitivity.kind}{each}):")
        print(rehearse(work))
        return
    if not resume:
        for place in chosen:
            check_free(place)
    for place, section in chosen.items():
        _train_one(section, place, resume=resume)
    places = " ".join(chosen)
    print(
        f"{SIGN_CONVENTION}\nThe {'run is' if len(chosen) == 1 else 'runs are'} in {places}; next:\n"
        f"  finfluence score {places} --query {next(iter(configuration.queries))}"
    )
    if len(chosen) > 1:
        print(f"  finfluence compare-runs {places}")
    print(
        f"  finfluence doctor {next(iter(chosen))}\n"
        f"  finfluence train {next(iter(chosen))}/{CONFIGURATION_FILE} --output DIRECTORY    repeat it"
    )


def _train_one(configuration: Configuration, directory: str, *, resume: bool) -> None:
    """Trains and records, and says how it went."""
    from finfluence.runs import open_run
    from finfluence.signals import open_folder
    from finfluence.workflows.finetuning import check_resumed, fine_tune, prepare

    began = time.perf_counter()
    work = prepare(configuration)
    print(work.describe(), file=sys.stderr)
    if resume:
        check_resumed(work, directory)
        folder = open_folder(directory)
        if "run.json" in folder.names() and json.loads(folder.read("run.json")).get("status") == "finished":
            print(f"{directory} is finished; there is nothing to resume.")
            return
    print(f"Loading the model and recording in {directory} ...", file=sys.stderr)
    run = fine_tune(work, directory, exist="resume" if resume else "error")
    run = open_run(directory) if run.store.status != "finished" else run
    steps = run.steps()
    losses, residual = steps["loss"], steps["residual"].max()
    print(
        f"{len(steps)} steps in {time.perf_counter() - began:.0f} s; training loss {losses[0]:.3f} at the first step, "
        f"{losses.tail(max(1, len(losses) // 10)).mean():.3f} over the last tenth"
        + ("" if residual is None else f"; largest residual of the signal identity {residual:.1e}")
    )


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() for word in words) or len(set(words)) < len(words):
        raise InputError(f"--seeds takes different whole numbers, separated by commas, for example 1,2,3; got {text!r}")
    return [int(word) for word in words]
