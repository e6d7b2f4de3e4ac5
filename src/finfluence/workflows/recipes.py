"""A recipe: everything needed to repeat a recorded training, by name.

A run that was recorded with a recipe carries the recipe's import path and arguments in `run.json`; the command line
uses them to rebuild the data, the model and the plan, for example to verify a finding by retraining.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from finfluence.errors import InputError

if TYPE_CHECKING:
    import polars as pl
    from torch import nn

    from finfluence.runs import Plan, Run, Task
    from finfluence.runs.data import Collate


@dataclass(frozen=True)
class Recipe:
    """A training that can be repeated.

    Attributes:
        task: losses and measurement.
        make_model: called with a seed, returns a fresh model.
        dataset: map-style dataset.
        queries: data of each query, by name.
        plan: how to train.
        samples: one row a sample, with columns worth reading or grouping by; None for the bare index.
        collate: makes a batch of a list of samples; None for PyTorch's own.
        executor: of the retraining oracle that suits the model: "ensemble" for small ones, else "processes".
        image_shape: shape in which a sample's tensor is a picture, (h, w), (c, h, w) or (h, w, c); None for the
            tensor's own.
        held_out: data that neither training nor queries see, for judging a cleaned model; None if there is none.
        reference: "module:function" and arguments this recipe was made from.
    """

    task: Task
    make_model: Callable[[int], nn.Module]
    dataset: Any
    queries: Mapping[str, Any]
    plan: Plan
    samples: pl.DataFrame | None = None
    collate: Collate | None = None
    executor: Literal["ensemble", "processes", "ray"] = "ensemble"
    image_shape: tuple[int, ...] | None = None
    held_out: Any = None
    reference: Mapping[str, Any] = field(default_factory=dict)

    def train(self, directory: str | os.PathLike[str], *, start: int | None = None, **options: Any) -> Run:
        """Records this training.

        Args:
            directory: run directory.
            start: seed of the initial parameters; the plan's own by default.
            **options: of `finfluence.train`: what is recorded; or what replaces an entry of the recipe.

        Returns:
            The run.

        Raises:
            FinfluenceError: as of `finfluence.train`.
        """
        from finfluence.runs import train

        own: dict[str, Any] = {entry.name: getattr(self.plan, entry.name) for entry in fields(self.plan)}
        own |= {
            "queries": self.queries,
            "samples": self.samples,
            "collate": self.collate,
            "recipe": self.reference or None,
        }
        model = self.make_model(self.plan.seed if start is None else start)
        return train(self.task, model, self.dataset, directory=directory, **(own | options))


def load_recipe(reference: Mapping[str, Any]) -> Recipe:
    """Rebuilds a recipe from the entry that a run keeps of it.

    Args:
        reference: {"function": "module:function", "arguments": {...}}.

    Raises:
        InputError: the function cannot be imported or does not return a Recipe.
    """
    name = str(reference.get("function", ""))
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"the recipe {name!r} cannot be imported ({error}); run where the code that recorded the run is importable"
        ) from error
    recipe = make(**reference.get("arguments", {}))
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"{name} returned {type(recipe).__name__}; a recipe function returns finfluence.workflows.Recipe"
        )
    return recipe
