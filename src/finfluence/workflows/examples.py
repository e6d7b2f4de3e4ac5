"""Rows of text as training examples: checked, named, tokenised; what is wrong is said in one line before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from finfluence.errors import InputError
from finfluence.integrations.text import IGNORED, tokenize_completion, tokenize_text
from finfluence.runs.sources import Source, first_repeat, read_source, row_hash
from finfluence.workflows.configuration import ColumnsSection, DataSection

RowFormat = Literal["chat", "completion", "text"]
Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class Examples:
    """A training set of text.

    Attributes:
        tokens: input_ids and labels of every row.
        samples: one row a sample: sample, text columns, group columns; of a dataset also content_hash, which
            `finfluence.train` takes from the file where there is one.
        digest: one hash of all rows, by which a later training notices that the data changed.
        format: how rows were read.
        cut: rows that were longer than allowed and lost their end.
        source: the file they came from, as `finfluence.train` takes it; None for a dataset.
    """

    tokens: list[Tokens]
    samples: pl.DataFrame
    digest: str
    format: RowFormat
    cut: int
    source: dict[str, Any] | None


def read_examples(data: DataSection, tokenizer: Any, *, max_length: int) -> Examples:
    """Reads, checks and tokenises the training data.

    Args:
        data: the section of the configuration, with absolute paths.
        tokenizer: of the model.
        max_length: tokens of a row.

    Raises:
        InputError: a missing file or column, ids that are missing or stand twice, rows with empty completions, a chat
            format without a chat template.
    """
    rows, origin, source = _rows(data)
    columns = dict.fromkeys(key for row in rows for key in row)
    shape = _format(data, columns, tokenizer, origin)
    _check_columns(data.group_columns, columns, origin, "group_columns")
    ids = _ids(rows, data.id_column, columns, origin)
    pairs = [_parts(row, data.columns, shape, system=data.system) for row in rows]
    _check_complete(pairs, shape, origin)
    tokens, cut = _tokenised(pairs, tokenizer, shape, max_length=max_length, origin=origin)
    frame: dict[str, Any] = {"sample": ids}
    if shape == "text":
        frame["text"] = [str(completion) for _, completion in pairs]
    else:
        frame["prompt"] = [_readable(prompt) for prompt, _ in pairs]
        frame["completion"] = [str(completion) for _, completion in pairs]
    frame |= {name: _column([row.get(name) for row in rows]) for name in data.group_columns if name not in frame}
    hashes = [row_hash(row) for row in rows]
    if source is None:
        frame["content_hash"] = hashes
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    return Examples(tokens, pl.DataFrame(frame), digest, shape, cut, source)


def query_rows(value: str | Sequence[Mapping[str, Any]], *, query: str) -> list[dict[str, Any]]:
    """The rows of a query, inline or from a file.

    Raises:
        InputError: the file cannot be read, or there is no row.
    """
    rows = read_source(value).rows if isinstance(value, str) else [dict(row) for row in value]
    if not rows:
        raise InputError(f"query {query!r} has no rows; give at least one")
    return rows


def tokenize_query(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    completion: Literal["completion", "against"],
    format: RowFormat,
    context: int | None,
    query: str,
    system: str | None = None,
) -> list[Tokens]:
    """The tokens of a query's rows.

    Args:
        rows: each with a prompt (or messages, or neither) and a completion.
        tokenizer: of the model.
        completion: key of the completion that is measured.
        format: of the training data, which prompts follow.
        context: most tokens that the model takes.
        query: its name, for messages.
        system: first message of conversations.

    Raises:
        InputError: a missing or empty completion, an unknown key, more tokens than the context.
    """
    found = []
    for i, row in enumerate(rows):
        name = f"query {query!r}, row {i}"
        if not isinstance(row.get(completion), str) or not row[completion].strip():
            raise InputError(
                f"{name} has no {completion!r} text (it has {', '.join(map(str, row)) or 'no keys'}); a row is "
                f"{{prompt: …, completion: …{', against: …' if completion == 'against' else ''}}}"
            )
        if (messages := row.get("messages")) is not None:
            prompt: Any = _with_system(_messages(messages), system)
        elif format == "chat" and row.get("prompt"):
            prompt = _with_system([{"role": "user", "content": str(row["prompt"])}], system)
        else:
            prompt = str(row.get("prompt") or "")
        found.append(tokenize_completion(tokenizer, prompt, row[completion], max_length=context, row=name))
    return found


def _rows(data: DataSection) -> tuple[list[dict[str, Any]], str, dict[str, Any] | None]:
    if data.path is not None:
        return read_source(data.path).rows, data.path, Source.of(data.path, id_column=data.id_column).as_dict()
    import datasets

    assert data.dataset is not None
    try:
        if Path(data.dataset).is_dir() and (Path(data.dataset) / "state.json").is_file():
            found: Any = datasets.load_from_disk(data.dataset)
        elif Path(data.dataset).is_dir() and (Path(data.dataset) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(data.dataset)[data.split]
        else:
            found = datasets.load_dataset(data.dataset, split=data.split)
    except KeyError:
        raise InputError(f"the dataset {data.dataset} has no split {data.split!r}; set data.split") from None
    except Exception as error:  # files, network, formats: the library raises what its parts raise
        reason = " ".join(str(error).split())[:240]
        raise InputError(
            f"cannot load the dataset {data.dataset!r}: {reason}; or give a file with data.path"
        ) from error
    return [dict(row) for row in found], data.dataset, None


def _format(data: DataSection, columns: Iterable[str], tokenizer: Any, origin: str) -> RowFormat:
    names, known = data.columns, set(columns)
    pair = {names.prompt, names.completion} <= known
    template = getattr(tokenizer, "chat_template", None) is not None
    if data.format == "auto":
        if names.messages in known:
            shape: RowFormat = "chat"
        elif pair:
            shape = "chat" if template else "completion"
        elif names.text in known:
            shape = "text"
        else:
            raise InputError(
                f"{origin} has none of the columns {names.messages!r}, {names.prompt!r} with {names.completion!r}, or "
                f"{names.text!r} (it has {', '.join(columns)}); set data.columns"
            )
    else:
        shape = data.format
    if shape == "chat" and not template:
        raise InputError(
            "data.format is chat, but the tokenizer has no chat template; use an instruction-tuned model's tokenizer "
            "(model.tokenizer), or set data.format: completion and give prompt and completion"
        )
    needed = (
        [names.text]
        if shape == "text"
        else [names.messages]
        if shape == "chat" and names.messages in known
        else [names.prompt, names.completion]
    )
    _check_columns(needed, columns, origin, f"columns (format {shape})")
    return shape


def _check_columns(needed: Iterable[str], columns: Iterable[str], origin: str, entry: str) -> None:
    known = list(columns)
    if missing := [name for name in needed if name not in known]:
        raise InputError(f"{origin} has no column {missing[0]!r}; set data.{entry} to names among {', '.join(known)}")


def _ids(rows: Sequence[Mapping[str, Any]], column: str | None, columns: Iterable[str], origin: str) -> pl.Series:
    if column is None:
        return pl.Series("sample", range(len(rows)), dtype=pl.Int64)
    _check_columns([column], columns, origin, "id_column")
    values = [row.get(column) for row in rows]
    missing = [i for i, value in enumerate(values) if value is None or str(value).strip() == ""]
    if missing:
        raise InputError(
            f"{origin}: {len(missing)} of {len(rows)} rows have no id in column {column!r}, the first is row "
            f"{missing[0]} (counted from 0); give every row an id, or leave data.id_column out"
        )
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if not whole:
        if wrong := next((v for v in values if not isinstance(v, (str, int))), None):
            raise InputError(f"{origin}: the id {wrong!r} is a {type(wrong).__name__}; use integers or text")
        values = [str(value) for value in values]
    if (repeat := first_repeat(values)) is not None:
        raise InputError(
            f"{origin}: the id {values[repeat[0]]!r} stands twice in column {column!r}, in rows {repeat[0]} and "
            f"{repeat[1]} (counted from 0); ids must be unique"
        )
    return pl.Series("sample", values, dtype=pl.Int64 if whole else pl.String)


def _parts(row: Mapping[str, Any], names: ColumnsSection, shape: RowFormat, *, system: str | None) -> tuple[Any, str]:
    """Prompt (text, messages, or None for plain text) and completion of a row; "" where there is none."""
    if shape == "text":
        return None, _text(row.get(names.text))
    if shape == "completion":
        return _text(row.get(names.prompt)), _text(row.get(names.completion))
    if names.messages not in row:
        prompt = [{"role": "user", "content": _text(row.get(names.prompt))}]
        return _with_system(prompt, system), _text(row.get(names.completion))
    messages = _messages(row.get(names.messages))
    if not messages or messages[-1]["role"] != "assistant":
        return messages, ""
    return _with_system(messages[:-1], system), messages[-1]["content"]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str):  # a column of a CSV file
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise InputError(f"messages {value[:60]!r} are not JSON; give a list of {{role, content}}") from None
    if value is None:
        return []
    try:
        return [{"role": str(m["role"]), "content": _text(m.get("content"))} for m in value]
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            f"messages must be a list of {{role: …, content: …}}, got {str(value)[:80]!r}; set data.columns.messages"
        ) from None


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _check_complete(pairs: Sequence[tuple[Any, str]], shape: RowFormat, origin: str) -> None:
    empty = [i for i, (_, completion) in enumerate(pairs) if not completion.strip()]
    if not empty:
        return
    what = {"text": "no text", "completion": "an empty completion", "chat": "no answer of the assistant at the end"}
    raise InputError(
        f"{origin}: {len(empty)} of {len(pairs)} rows have {what[shape]}, the first is row {empty[0]} (counted from "
        "0); nothing can be learnt from them, remove them"
    )


def _tokenised(
    pairs: Sequence[tuple[Any, str]], tokenizer: Any, shape: RowFormat, *, max_length: int, origin: str
) -> tuple[list[Tokens], int]:
    tokens, cut, without = [], 0, []
    for i, (prompt, completion) in enumerate(pairs):
        name = f"{origin}, row {i} (counted from 0)"
        if shape == "text":
            found = tokenize_text(tokenizer, completion, row=name)
        else:
            found = tokenize_completion(tokenizer, prompt, completion, row=name)
        if len(found["input_ids"]) > max_length:
            cut += 1
            found = {key: values[:max_length] for key, values in found.items()}
        # the first token is never predicted
        if all(label == IGNORED for label in found["labels"][1:]):
            without.append(i)
        tokens.append(found)
    if without:
        raise InputError(
            f"{origin}: {len(without)} of {len(pairs)} rows have no token of their completion within data.max_length "
            f"{max_length}, the first is row {without[0]} (counted from 0); raise data.max_length or shorten prompts"
        )
    return tokens, cut


def _readable(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _column(values: list[Any]) -> pl.Series:
    """A column for grouping: of one type, nested values as JSON."""
    plain = [v if v is None or isinstance(v, (str, int, float, bool)) else json.dumps(v, default=str) for v in values]
    kinds = {type(v) for v in plain if v is not None}
    return pl.Series(plain if len(kinds) <= 1 else [None if v is None else str(v) for v in plain])


__all__ = ["Examples", "query_rows", "read_examples", "tokenize_query"]
