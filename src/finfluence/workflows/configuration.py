"""The configuration of a recorded fine-tuning: one YAML file, read, checked and made independent of where it lies.

Paths of the model, the data and the queries are relative to the configuration file; the output directory is relative
to the current directory, as `--output` is. Unknown keys, wrong types and missing entries are errors of one line.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finfluence.errors import InputError

DataFormat = Literal["auto", "chat", "completion", "text"]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, without keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LoraSection(Section):
    """The adapter, as peft makes it.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input.
        targets: names of the modules that are adapted, or "all-linear".
        variant: "lora" or "dora".
    """

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | list[str] = "all-linear"
    variant: Literal["lora", "dora"] = "lora"


class ModelSection(Section):
    """The model that is fine-tuned.

    Attributes:
        name: a local directory or a name on the Hugging Face hub.
        revision: of the hub.
        gguf_file: file inside `name` that holds the weights in GGUF.
        tokenizer: where another than the model's own is used.
        dtype: of the model's weights. Adapters on weights of less than 32 bits are float32.
        attention: kernel, "sdpa" or "eager".
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        lora: the adapter; None trains all parameters.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    lora: LoraSection | None = None


class ColumnsSection(Section):
    """Names of the columns that hold the text."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"


class DataSection(Section):
    """The training data: one of `path` and `dataset`.

    Attributes:
        path: a JSON-lines, CSV or Parquet file.
        dataset: a directory written by datasets' `save_to_disk`, or a name on the Hugging Face hub.
        split: of the dataset.
        format: "chat" (messages, or prompt and completion as the turns of a conversation, through the tokenizer's chat
            template), "completion" (prompt and completion joined as they are), "text" (every token is learnt), or
            "auto": by the columns that there are, and "chat" for prompts where the tokenizer has a template.
        columns: names of the columns that hold the text.
        id_column: names the samples; their index by default.
        group_columns: kept beside the samples, for grouping and reading.
        max_length: tokens of a row; longer ones are cut at their end. The context of the model, at most 1024, by
            default.
        system: first message of every conversation that has none of its own.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    format: DataFormat = "auto"
    columns: ColumnsSection = ColumnsSection()
    id_column: str | None = None
    group_columns: list[str] = []
    max_length: Annotated[int, Field(ge=2)] | None = None
    system: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give one of path (a JSONL, CSV or Parquet file) and dataset (a name or a saved dataset)")
        return self


class QuerySection(Section):
    """What is asked about the model: one of three.

    Attributes:
        completions: mean loss of completions; rows with prompt (or messages) and completion, or a file of them.
        contrast: loss of `completion` minus loss of `against`, for the same prompts; rows with both, or a file.
        contrast_weight: of the loss of `against`; 1 by default, 0.5 often finds more.
        function: "module:function" that is called with the model and the tokenizer and returns a scalar tensor.
    """

    completions: str | list[dict[str, Any]] | None = None
    contrast: str | list[dict[str, Any]] | None = None
    contrast_weight: Annotated[float, Field(gt=0)] = 1.0
    function: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> QuerySection:
        given = [name for name in ("completions", "contrast", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of completions, contrast and function, got {' and '.join(given) or 'none'}")
        if self.contrast is None and self.contrast_weight != 1.0:
            raise ValueError("contrast_weight belongs to a contrast; leave it out")
        return self

    @property
    def kind(self) -> Literal["completions", "contrast", "function"]:
        """Which of the three is given."""
        return next(name for name in ("completions", "contrast", "function") if getattr(self, name) is not None)


class OptimizerSection(Section):
    """The optimizer; entries that it does not have are ignored.

    Attributes:
        name: "adamw", "adam" or "sgd".
        lr: learning rate.
        weight_decay: decoupled for adamw.
        betas: of adam and adamw.
        eps: of adam and adamw.
        momentum: of sgd.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Annotated[float, Field(ge=0)] = 0.0


class ScheduleSection(Section):
    """The learning-rate schedule, see `finfluence.Schedule`."""

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class TrainingSection(Section):
    """How the model is trained, see `finfluence.train`.

    Attributes:
        device: "auto" takes a GPU where there is one.
    """

    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    epochs: Positive = 1
    batch_size: Positive = 8
    accumulation: Positive = 1
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["float32", "bfloat16-autocast"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"


class PanelSection(Section):
    """The noise panel, see `finfluence.NoisePanel`."""

    samples: Annotated[int, Field(ge=0)] = 64
    positions: Annotated[int, Field(ge=2)] = 4


class SensitivitySection(Section):
    """How influence is recorded, see `finfluence.train` and `finfluence.ReplayOptions`.

    Attributes:
        kind: "live" ranks, "replay" is calibrated, "both" records both.
        refresh: steps between two evaluations of the live query gradients.
        signals: "batch", or "full" for every sample at the panel's positions.
        hessian: Hessian-vector products of the replay; finite differences need no double backward.
        damping: κ of the damped Adam adjoint; the library's own by default.
        measure_epochs: epochs after which the replay's queries are measured, whole or not, "second-half", or
            "throughout", which finds rows of which many teach the same; the end by default.
        checkpoint_every: steps between states; about the square root of the number of steps by default.
        self_influence: "record" also records each sample's influence on its own loss where batches hold it, "all" that
            of every sample at three steps, for relative influence after few epochs.
    """

    kind: Literal["live", "replay", "both"] = "live"
    refresh: Positive = 1
    signals: Literal["batch", "full"] = "batch"
    panel: PanelSection = PanelSection()
    hessian: Literal["one-sided", "central", "exact", "auto"] = "one-sided"
    damping: Annotated[float, Field(ge=0)] | None = None
    measure_epochs: tuple[Annotated[int | float, Field(gt=0)], ...] | Literal["second-half", "throughout"] | None = None
    checkpoint_every: Positive | None = None
    self_influence: Literal["none", "record", "all"] = "none"


class Configuration(Section):
    """A fine-tuning run that is recorded.

    Attributes:
        model: what is trained.
        data: on what.
        queries: what is asked, by name.
        training: how.
        sensitivity: how it is recorded.
        output: run directory; `--output` overrides it.
    """

    model: ModelSection
    data: DataSection
    queries: dict[str, QuerySection]
    training: TrainingSection = TrainingSection()
    sensitivity: SensitivitySection = SensitivitySection()
    output: str | None = None

    @field_validator("queries")
    @classmethod
    def _some_query(cls, value: dict[str, QuerySection]) -> dict[str, QuerySection]:
        if not value:
            raise ValueError("give at least one query")
        return value

    def as_dict(self) -> dict[str, Any]:
        """Every entry, defaults too, JSON-ready; `parse_configuration` reads it back."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """Every entry, defaults too, as a configuration file."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=120)


def read_configuration(path: str | os.PathLike[str]) -> Configuration:
    """Reads and checks a configuration file and makes its paths absolute.

    Args:
        path: a YAML file.

    Raises:
        InputError: it is missing, is not YAML, or an entry is unknown, missing or wrong; files that it names are
            missing.
    """
    file = Path(path)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise InputError(f"cannot read the configuration {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds {type(content).__name__}, not a configuration; start with the key model")
    return _with_paths(parse_configuration(content, origin=str(file)), file.resolve().parent)


def parse_configuration(content: Mapping[str, Any], *, origin: str = "the configuration") -> Configuration:
    """Checks a configuration given as nested mappings.

    Args:
        content: as a YAML file or `Configuration.as_dict` gives it.
        origin: how messages name it.

    Raises:
        InputError: an entry is unknown, missing or wrong; the first one is named, and how many more there are.
    """
    try:
        return Configuration.model_validate(dict(content))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        # an unknown key is usually the cause of one that is missing
        found.sort(key=lambda entry: entry["type"] != "extra_forbidden")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InputError(f"{origin}: {_describe(found[0])}{more}") from None


def _describe(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"unknown key {name!r}; {hint}"
    if error["type"] == "missing":
        return f"{name!r} is missing; it is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name!r}: {message}" if name else message
    value = repr(error["input"])
    return f"{name!r} is {value if len(value) <= 80 else value[:77] + '...'}: {message[:1].lower()}{message[1:]}"


def _keys(location: list[str]) -> list[str]:
    """The keys of the section at a location."""
    section: type[BaseModel] = Configuration
    for part in location:
        field = section.model_fields.get(part)
        found = None if field is None else _section_of(field.annotation)
        section = found or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in typing.get_args(annotation) if (found := _section_of(part))), None)


def _with_paths(found: Configuration, base: Path) -> Configuration:
    """The configuration with absolute paths, and their files there."""
    model, data = found.model, found.data
    name = _local(base, model.name)
    if model.gguf_file is not None and Path(name).is_dir() and not (Path(name) / model.gguf_file).is_file():
        raise InputError(f"model.gguf_file {model.gguf_file!r} is not in {name}; name a file in that directory")
    model = model.model_copy(
        update={"name": name, "tokenizer": None if model.tokenizer is None else _local(base, model.tokenizer)}
    )
    if data.path is not None:
        data = data.model_copy(update={"path": _file(base, data.path, "data.path")})
    elif data.dataset is not None:
        data = data.model_copy(update={"dataset": _local(base, data.dataset)})
    queries = {}
    for key, query in found.queries.items():
        kind = query.kind
        value = getattr(query, kind)
        if kind != "function" and isinstance(value, str):
            query = query.model_copy(update={kind: _file(base, value, f"queries.{key}.{kind}")})
        queries[key] = query
    output = None if found.output is None else str(Path(found.output).absolute()) if _is_local(found.output) else None
    return found.model_copy(update={"model": model, "data": data, "queries": queries, "output": output or found.output})


def _is_local(path: str) -> bool:
    return "://" not in path


def _file(base: Path, path: str, entry: str) -> str:
    found = base / Path(path).expanduser()
    if not found.is_file():
        raise InputError(f"{entry}: there is no file {found}; paths are relative to the configuration file")
    return str(found)


def _local(base: Path, name: str) -> str:
    """The directory that a name stands for, or the name itself: it may be one of a hub."""
    found = base / Path(name).expanduser()
    if found.exists():
        return str(found)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"there is no directory {found}; paths are relative to the configuration file")
    return name


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key that stands twice is an error; the last one would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else str(key))
        return super().construct_mapping(node, deep=deep)


__all__ = ["Configuration", "parse_configuration", "read_configuration"]
