"""Fine-tuning of a causal language model by a configuration, recorded: what `finfluence train` does.

`prepare` reads and checks everything but the weights, `fine_tune` trains, `recipe` is what a recorded run names, so
that it can be repeated without some of its samples.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import nn

from finfluence.errors import InputError, StoreError
from finfluence.integrations.models import (
    attach_lora,
    load_causal_model,
    load_model_config,
    load_tokenizer,
    resolve_device,
)
from finfluence.integrations.text import context_length, pad_batch, pad_token_id
from finfluence.runs import CausalLMTask, Contrast, NoisePanel, Plan, ReplayOptions, Run, Schedule
from finfluence.runs.plan import OptimizerConfig
from finfluence.sensitivity import SGD, Adam, AdamW
from finfluence.signals import open_folder
from finfluence.workflows.configuration import (
    Configuration,
    ModelSection,
    OptimizerSection,
    SensitivitySection,
    parse_configuration,
)
from finfluence.workflows.examples import Examples, RowFormat, query_rows, read_examples, tokenize_query
from finfluence.workflows.recipes import Recipe

RECIPE = "finfluence.workflows.finetuning:recipe"
CONFIGURATION_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"
_DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class FineTuning:
    """A checked configuration and everything that it stands for, the weights aside.

    Attributes:
        configuration: with the format and the length that were found.
        recipe: task, data, queries and plan.
        examples: the training data.
        context: most tokens that the model takes; None where it does not say.
    """

    configuration: Configuration
    recipe: Recipe
    examples: Examples
    context: int | None

    def describe(self) -> str:
        """What will be trained, in words."""
        model, data, plan = self.configuration.model, self.configuration.data, self.recipe.plan
        adapter = "all parameters" if model.lora is None else f"{model.lora.variant} r={model.lora.r}"
        lengths = [len(row["input_ids"]) for row in self.examples.tokens]
        cut = f", {self.examples.cut} cut at {data.max_length}" if self.examples.cut else ""
        return (
            f"{model.name} ({adapter}, {model.dtype}) on {len(lengths)} rows of {data.path or data.dataset} "
            f"(format {self.examples.format}, {sum(lengths) / len(lengths):.0f} tokens a row, longest "
            f"{max(lengths)}{cut}); {plan.steps(len(lengths))} steps of {plan.batch_size}; "
            f"queries: {', '.join(self.recipe.queries)}"
        )


@dataclass(frozen=True)
class ModelMaker:
    """Makes the model of a configuration; the seed decides an adapter's initial values.

    Attributes:
        model: the section of the configuration, as a mapping.
        device: where the model is put.
    """

    model: Mapping[str, Any]
    device: str = "cpu"

    def __call__(self, seed: int) -> nn.Module:
        """The model, in training mode."""
        section = ModelSection.model_validate(dict(self.model))
        found = load_causal_model(
            section.name,
            revision=section.revision,
            gguf_file=section.gguf_file,
            dtype=section.dtype,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing,
        )
        if section.lora is not None:
            found = attach_lora(found, **section.lora.model_dump(), seed=seed)
        return found.to(self.device)


def prepare(configuration: Configuration) -> FineTuning:
    """Reads the tokenizer, the data and the queries of a configuration and checks them, before any weight is loaded.

    Args:
        configuration: with absolute paths.

    Raises:
        InputError: what is wrong, in one line.
    """
    section, data, training = configuration.model, configuration.data, configuration.training
    tokenizer = load_tokenizer(
        section.tokenizer or section.name,
        revision=section.revision if section.tokenizer is None else None,
        gguf_file=section.gguf_file if section.tokenizer is None else None,
    )
    context = _context(section)
    if context is not None and data.max_length is not None and data.max_length > context:
        raise InputError(
            f"data.max_length is {data.max_length}, but the model's context is {context} tokens; lower data.max_length"
        )
    length = data.max_length or min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    examples = read_examples(data, tokenizer, max_length=length)
    n = len(examples.tokens)
    if n < training.batch_size:
        raise InputError(
            f"the data have {n} rows, fewer than a batch of {training.batch_size}; lower training.batch_size"
        )
    found = configuration.model_copy(
        update={"data": data.model_copy(update={"format": examples.format, "max_length": length})}
    )
    pad = pad_token_id(tokenizer)
    queries = _queries(configuration, tokenizer, format=examples.format, context=context, pad=pad)
    plan = Plan(
        optimizer=make_optimizer(training.optimizer),
        epochs=training.epochs,
        batch_size=training.batch_size,
        seed=training.seed,
        schedule=Schedule(training.schedule.kind, warmup_steps=training.schedule.warmup_steps),
        clip_norm=training.clip_norm,
        accumulation=training.accumulation,
        precision=training.precision,
    )
    made = Recipe(
        task=CausalLMTask(),
        make_model=ModelMaker(section.model_dump(mode="json"), device=resolve_device(training.device)),
        dataset=examples.tokens,
        queries=queries,
        plan=plan,
        samples=examples.samples,
        collate=functools.partial(pad_batch, pad_id=pad),
        executor="processes",
        reference={
            "function": RECIPE,
            "arguments": {"configuration": found.as_dict(), "digest": examples.digest},
        },
    )
    return FineTuning(found, made, examples, context)


def recipe(configuration: Mapping[str, Any], digest: str | None = None) -> Recipe:
    """The recipe that a recorded fine-tuning names in run.json.

    Args:
        configuration: as `Configuration.as_dict` gives it.
        digest: hash of the data that the run was trained on; None for no check.

    Raises:
        InputError: the configuration cannot be used any more, or the data changed since.
    """
    work = prepare(parse_configuration(configuration, origin="the recorded configuration"))
    if digest is not None and work.examples.digest != digest:
        data = work.configuration.data
        raise InputError(
            f"the training data {data.path or data.dataset} changed since the run was recorded; put back the file that "
            "it was trained on"
        )
    return work.recipe


def fine_tune(
    work: FineTuning,
    directory: str | os.PathLike[str],
    *,
    exist: Literal["error", "resume"] = "error",
    show_progress: Literal["auto", "never"] = "auto",
) -> Run:
    """Trains and records.

    Args:
        work: from `prepare`.
        directory: run directory; gets config.yaml and environment.json beside the run.
        exist: "resume" goes on with a run of the same configuration that was killed.
        show_progress: as of `finfluence.train`.

    Raises:
        InputError: a model that cannot be loaded or has nothing to train; a resumed run of another configuration.
        FinfluenceError: as of `finfluence.train`.
    """
    if exist == "resume":
        check_resumed(work, directory)
    else:
        # before minutes of loading; `train` itself checks again
        check_free(directory)
    made, options = work.recipe, work.configuration.sensitivity
    with _described(work, directory):
        return made.train(
            directory,
            sensitivity=options.kind,
            signals=options.signals,
            refresh=options.refresh,
            panel=make_panel(options, len(made.dataset)),
            self_influence=options.self_influence,
            checkpoint_every=options.checkpoint_every,
            replay_options=make_replay_options(options),
            source=work.examples.source,
            exist=exist,
            show_progress=show_progress,
        )


def recorded_configuration(manifest: Mapping[str, Any]) -> Configuration | None:
    """The configuration that a run was made from; None for a run of another kind."""
    reference = manifest.get("recipe") or {}
    if reference.get("function") != RECIPE:
        return None
    return parse_configuration(reference["arguments"]["configuration"], origin="the recorded configuration")


def check_resumed(work: FineTuning, directory: str | os.PathLike[str]) -> None:
    """Checks that a run directory, where it holds a run, is one of this configuration and these data.

    Raises:
        InputError: names the first entry that differs.
    """
    folder = open_folder(directory)
    if "run.json" not in folder.names():
        return
    manifest = json.loads(folder.read("run.json"))
    before = recorded_configuration(manifest)
    if before is None:
        raise InputError(f"{folder.display} holds a run that `finfluence train` did not make; choose another directory")
    difference = _first_difference(before.as_dict() | {"output": None}, work.configuration.as_dict() | {"output": None})
    if difference is not None:
        raise InputError(
            f"{folder.display} was recorded with another configuration: {difference}; resume it as it was with "
            f"finfluence train {folder.display} --resume, or choose another directory"
        )
    if manifest["recipe"]["arguments"].get("digest") != work.examples.digest:
        raise InputError(f"the training data changed since {folder.display} was begun; put back the file or start anew")


def make_optimizer(section: OptimizerSection) -> OptimizerConfig:
    """The optimizer of a configuration.

    Raises:
        InputError: a value out of its range.
    """
    if section.name == "sgd":
        return SGD(lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    kind = Adam if section.name == "adam" else AdamW
    return kind(lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def make_panel(section: SensitivitySection, n: int) -> NoisePanel:
    """The noise panel of a configuration, at most all n samples."""
    return NoisePanel(samples=min(section.panel.samples, n), positions=section.panel.positions)


def make_replay_options(section: SensitivitySection) -> ReplayOptions:
    """The replay of a configuration."""
    options: dict[str, Any] = {} if section.damping is None else {"damping": section.damping}
    return ReplayOptions(hessian=section.hessian, measure_epochs=section.measure_epochs, **options)


def _context(section: ModelSection) -> int | None:
    class Holder:
        config = load_model_config(section.name, revision=section.revision, gguf_file=section.gguf_file)

    return context_length(Holder)


def _queries(
    configuration: Configuration, tokenizer: Any, *, format: RowFormat, context: int | None, pad: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, query in configuration.queries.items():
        if query.function is not None:
            found[name] = functools.partial(_function(query.function, name), tokenizer=tokenizer)
            continue
        rows = query_rows(query.completions or query.contrast or [], query=name)
        make = functools.partial(
            tokenize_query,
            rows,
            tokenizer,
            format=format,
            context=context,
            query=name,
            system=configuration.data.system,
        )
        first = pad_batch(make(completion="completion"), pad)
        if query.kind == "contrast":
            found[name] = Contrast(first, pad_batch(make(completion="against"), pad), query.contrast_weight)
        else:
            found[name] = first
    return found


def _function(reference: str, query: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"query {query!r}: the function {reference!r} cannot be imported ({error}); write it as module:function "
            "and run where that module is importable"
        ) from None
    if not callable(function):
        raise InputError(f"query {query!r}: {reference!r} is a {type(function).__name__}, not a function")
    return function


def _first_difference(before: Any, now: Any, name: str = "") -> str | None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            if found := _first_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return None
    return None if before == now else f"{name} was {before!r} and is now {now!r}"


def check_free(directory: str | os.PathLike[str]) -> None:
    """Checks that a directory holds no run.

    Raises:
        StoreError: it does.
    """
    folder = open_folder(directory)
    if "run.json" in folder.names():
        raise StoreError(
            f"{folder.display} already holds a run; choose another directory with --output, or go on with --resume"
        )


@contextlib.contextmanager
def _described(work: FineTuning, directory: str | os.PathLike[str]) -> Iterator[None]:
    """Leaves the configuration and the environment in the run directory, also where the training fails."""
    folder = open_folder(directory)
    try:
        yield
    finally:
        if "run.json" in folder.names():
            full = work.configuration.model_copy(update={"output": folder.display})
            note = f"# Repeats this run: finfluence train {folder.path(CONFIGURATION_FILE)} --output DIRECTORY\n"
            folder.write(CONFIGURATION_FILE, (note + full.as_yaml()).encode())
            folder.write(ENVIRONMENT_FILE, (json.dumps(installed(), indent=1) + "\n").encode())


def installed() -> dict[str, Any]:
    """Versions of all installed packages, and what PyTorch computes with."""
    packages = {str(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
    }


__all__ = ["FineTuning", "ModelMaker", "fine_tune", "prepare", "recipe", "recorded_configuration"]
