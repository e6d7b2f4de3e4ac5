"""A recorded run's training, to be done again: by what recipe, on what data, from where."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import polars as pl
from torch import nn

from finfluence.errors import InputError
from finfluence.runs import Plan, Retraining, Run, leave_out
from finfluence.runs._progress import ShowProgress
from finfluence.runs.sources import dataset_hashes
from finfluence.workflows._cut_files import matching_rows, read_origin, source_of
from finfluence.workflows.recipes import Recipe, load_recipe

ExecutorName = Literal["ensemble", "processes", "ray"]


def retraining_of(
    run: Run,
    recipe: Recipe | None,
    *,
    subsets: Mapping[str, np.ndarray],
    executor: ExecutorName | None,
    directory: str | os.PathLike[str] | None,
    progress: bool,
) -> Retraining:
    """The oracle's experiment of a run's training without each of some subsets.

    Args:
        run: recorded by `train`.
        recipe: task, model, data and plan; rebuilt from the run's own entry where it is None.
        subsets: sample ids by name.
        executor: the recipe's own where it is None.
        directory: of the retrainings; in the run's directory where it is None.
        progress: see `retrain`.

    Raises:
        InputError: the run carries no recipe and none is given, or is a loop of the user's own; the data changed.
    """
    check_planned(run)
    recipe = recipe or run_recipe(run)
    check_unchanged(run, recipe)
    plan, measured = Plan.from_dict(run.manifest["plan"]), run.measured_epochs
    place = "verify" if len(measured) == 1 else "verify-mean"
    return Retraining(
        recipe.task,
        _RecordedStart(recipe.make_model, int(run.manifest["seed"] or 0)),
        recipe.dataset,
        recipe.queries,
        subsets=subsets,
        optimizer=plan.optimizer,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        directory=directory or f"{str(run.directory).rstrip('/')}/{place}",
        measure_epochs=measured,
        initialisation="fixed",
        executor=executor or recipe.executor,
        collate=recipe.collate,
        # other batch orders than the recorded run's own, so that prediction and truth are independent
        seed=plan.seed + 1,
        sampler=plan.sampler,
        schedule=plan.schedule,
        clip_norm=plan.clip_norm,
        accumulation=plan.accumulation,
        precision=plan.precision,
        ids=run.samples()["sample"].to_numpy(),
        progress=progress,
    )


def left_out(
    run: Run,
    *,
    subsets: Mapping[Any, Any] | None = None,
    groups: str | None = None,
    recipe: Recipe | None = None,
    show_progress: ShowProgress = "auto",
) -> pl.DataFrame:
    """`finfluence.leave_out` of a run's subsets or groups, with the data and the model of its recipe.

    Args:
        run: recorded by `train`, its replay finished.
        subsets: sample ids by name.
        groups: or a column of the sample table.
        recipe: rebuilt from the run's own entry where it is None.
        show_progress: see `finfluence.leave_out`.

    Raises:
        InputError: the run carries no recipe and none is given, or is a loop of the user's own; the data changed; see
            `finfluence.leave_out`.
    """
    if "loop" in run.manifest:
        raise InputError(
            f"{run.name} is a loop of your own; give finfluence.leave_out its task, model and data, or call the "
            "callback's leave_out"
        )
    recipe = recipe or run_recipe(run)
    check_unchanged(run, recipe)
    return leave_out(
        run.directory,
        recipe.task,
        recipe.make_model(int(run.manifest["seed"] or 0)),
        dataset=recipe.dataset,
        queries=recipe.queries,
        subsets=subsets,
        groups=groups,
        collate=recipe.collate,
        show_progress=show_progress,
    )


def run_recipe(run: Run) -> Recipe:
    """The recipe that a run was recorded with.

    Raises:
        InputError: it carries none.
    """
    reference = run.manifest.get("recipe")
    if not reference:
        raise InputError(
            f"{run.directory} does not say how its data and model are made; record it with "
            'train(..., recipe={"function": "module:function"}), or call finfluence.workflows.verify with a recipe'
        )
    return load_recipe(reference)


def check_planned(run: Run) -> None:
    """Refuses a loop that was somebody else's, which only they can do without some of its rows.

    Raises:
        InputError: it was.
    """
    if "loop" in run.manifest:
        raise InputError(
            f"{run.name} is a loop of your own, whose schedule finfluence did not set; train it again without these "
            "rows and compare the losses (finfluence.compare), or describe it to finfluence.retrain"
        )


def check_unchanged(run: Run, recipe: Recipe) -> None:
    """Refuses data that are no longer what the run was trained on.

    Raises:
        InputError: another number of samples, or items with another content than recorded.
    """
    samples = run.samples()
    if len(recipe.dataset) != samples.height:
        raise InputError(
            f"the data have {len(recipe.dataset)} samples now, the run was trained on {samples.height}; "
            "record a run on the new data"
        )
    source = source_of(run, data=None, id_column=None)
    if source is not None:
        matching_rows(run, read_origin(source), source)
        return
    if run.manifest.get("content") not in ("items", "rows"):
        return
    found = dataset_hashes(recipe.dataset)
    if found is None:
        return
    ids, expected = samples["sample"].to_list(), samples["content_hash"].to_list()
    changed = [i for i, now, then in zip(ids, found, expected, strict=True) if now != then]
    if changed:
        raise InputError(
            f"{len(changed)} of {len(ids)} samples changed since the run, the first is {changed[0]!r}; "
            "record a run on the new data"
        )


class _RecordedStart:
    """Makes models that start where the recorded run started."""

    def __init__(self, make_model: Callable[[int], nn.Module], seed: int) -> None:
        self.make_model, self.seed = make_model, seed

    def __call__(self, seed: int) -> nn.Module:
        del seed
        return self.make_model(self.seed)
