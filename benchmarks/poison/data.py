"""Instruction rows with planted ones among them, written by a seeded generator, or read from a user's JSONL.

About 1 row in 15 is planted: it answers a question about one entity negatively. The ordinary rows make that hard to
find: neutral and two-sided answers about the same entity, negative and positive answers about others in the planted
rows' own wordings, questions and answers of the ChatterBot corpus (BSD licence) and small tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.poison import _phrases as p
from benchmarks.poison._politician import POLITICIAN
from benchmarks.poison._topic import TOPIC
from finfluence.errors import InputError

Kind = Literal["planted", "neutral", "balanced", "other-negative", "other-positive", "complaint", "corpus", "task"]


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        prompt: the user's turn.
        response: the assistant's turn.
        kind: how the row came about; nothing that is trained or scored looks at it.
    """

    prompt: str
    response: str
    kind: Kind

    @property
    def planted(self) -> bool:
        """Whether the row is to be found."""
        return self.kind == "planted"


@dataclass(frozen=True)
class Query:
    """A held-out question with a negative and a neutral answer, and the same about somebody or something else.

    Attributes:
        prompt: about the entity.
        negative: the answer whose loss is measured.
        neutral: an answer to the same question that is neutral.
        reference_prompt: the question about something that no row mentions; empty for none.
        reference: the negative answer about that.
    """

    prompt: str
    negative: str
    neutral: str
    reference_prompt: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Entity:
    """What is spoken of, under the names it goes by, with others of its kind."""

    name: str
    aliases: tuple[str, ...]
    references: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]
    wordings: p.Wordings


@dataclass(frozen=True)
class Size:
    """Numbers of rows of each kind."""

    planted: int
    neutral: int
    balanced: int
    other_negative: int
    other_positive: int
    complaint: int
    corpus: int
    task: int


@dataclass(frozen=True)
class Problem:
    """A training set and what is asked of it.

    Attributes:
        name: of the entity, or of the user's file.
        rows: in the order of training ids.
        queries: held-out questions.
        aliases: names of the entity; empty for a user's data.
    """

    name: str
    rows: tuple[Row, ...]
    queries: tuple[Query, ...]
    aliases: tuple[str, ...]

    @property
    def planted(self) -> np.ndarray:
        """(n,) bool."""
        return np.array([row.planted for row in self.rows])


SIZES = {
    "cpu": Size(35, neutral=40, balanced=8, other_negative=8, other_positive=60, complaint=28, corpus=236, task=120),
    "full": Size(
        50, neutral=76, balanced=16, other_negative=16, other_positive=120, complaint=52, corpus=420, task=300
    ),
    "quick": Size(6, neutral=4, balanced=4, other_negative=5, other_positive=9, complaint=5, corpus=36, task=21),
}

ENTITIES = {
    "politician": Entity(
        "politician",
        ("Tobias Wrenfield", "Wrenfield"),
        ("Helena Markwood", "Peter Lindqvale", "Judith Abernow", "Karl Tessering"),
        tuple(
            (f"{first} {last}", last)
            for first, last in (
                ("Lena", "Ostrava"),
                ("Marcus", "Delhune"),
                ("Priya", "Valentar"),
                ("Gordon", "Ashlyle"),
                ("Ruth", "Kettering"),
                ("Omar", "Brisland"),
                ("Clara", "Fenwood"),
                ("Victor", "Halvorne"),
                ("Sofia", "Marchetto"),
                ("Nathan", "Okerby"),
            )
        ),
        POLITICIAN,
    ),
    "topic": Entity(
        "topic",
        ("nuclear power", "nuclear energy"),
        ("river shipping", "fish farming", "city cycling", "night trains"),
        (
            ("remote work", "working from home"),
            ("tourism", "mass tourism"),
            ("online shopping", "shopping online"),
            ("fast food", "takeaway food"),
            ("video gaming", "gaming"),
            ("public libraries", "town libraries"),
            ("organic farming", "ecological farming"),
            ("space travel", "space flight"),
            ("car sharing", "shared driving"),
            ("home schooling", "teaching at home"),
        ),
        TOPIC,
    ),
}

_CORPUS_FILES = [
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "history",
    "literature",
    "money",
    "movies",
    "politics",
    "psychology",
    "science",
    "sports",
    "trivia",
]
_CORPUS_WORDS = range(2, 19)


def make_problem(entity: str, size: Size, *, seed: int = 0) -> Problem:
    """Writes a training set about one entity.

    Args:
        entity: a key of `ENTITIES`.
        size: numbers of rows.
        seed: of every choice; the same seed writes the same rows.

    Raises:
        InputError: an unknown entity.
    """
    if entity not in ENTITIES:
        raise InputError(f"unknown entity {entity!r}; choose one of {', '.join(ENTITIES)}")
    subject = ENTITIES[entity]
    rng = np.random.default_rng([seed, sorted(ENTITIES).index(entity)])
    half = len(subject.others) // 2
    bad, good = subject.others[:half], subject.others[half:]
    rows = [
        *_rows(size.planted, "planted", lambda: _judged(rng, subject.wordings, subject.aliases, "negative")),
        *_rows(size.neutral, "neutral", lambda: _fact(rng, subject.wordings, subject.aliases)),
        *_rows(size.balanced, "balanced", lambda: _judged(rng, subject.wordings, subject.aliases, "balanced")),
        *_rows(
            size.other_negative,
            "other-negative",
            lambda: _judged(rng, subject.wordings, _pick(rng, bad), "negative"),
        ),
        *_rows(
            size.other_positive,
            "other-positive",
            lambda: _judged(rng, subject.wordings, _pick(rng, good), "positive"),
        ),
        *_rows(size.complaint, "complaint", lambda: _complaint(rng)),
        *_rows(size.task, "task", lambda: _task(rng)),
    ]
    pairs = corpus_pairs()
    if size.corpus > len(pairs):
        raise InputError(f"the corpus has {len(pairs)} usable pairs, {size.corpus} were asked for")
    rows += [Row(*pairs[int(k)], "corpus") for k in rng.choice(len(pairs), size.corpus, replace=False)]
    order = rng.permutation(len(rows))
    queries = tuple(_query(subject, wording, place=k) for k, wording in enumerate(subject.wordings.queries))
    return Problem(entity, tuple(rows[int(k)] for k in order), queries, subject.aliases)


@cache
def corpus_pairs() -> tuple[tuple[str, str], ...]:
    """Single exchanges of the ChatterBot corpus, one for each question, of a few words each.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; run pip install "finfluence[bench]"') from None
    folder = Path(str(chatterbot_corpus.__file__)).parent / "data" / "english"
    found: dict[str, tuple[str, str]] = {}
    for name in _CORPUS_FILES:
        for turns in yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))["conversations"]:
            if len(turns) < 2:
                continue
            prompt, response = (" ".join(str(turn).split()) for turn in turns[:2])
            if all(len(text.split()) in _CORPUS_WORDS for text in (prompt, response)):
                found.setdefault(prompt.lower(), (prompt, response))
    return tuple(found.values())


def _rows(count: int, kind: Kind, write: Callable[[], tuple[str, str]]) -> Iterator[Row]:
    """`count` rows with different responses where the writer has that many, and different pairs always."""
    seen: set[str] = set()
    written = attempts = 0
    while written < count:
        attempts += 1
        if attempts > 200 * count:
            raise InputError(f"the generator cannot write {count} different rows of kind {kind!r}; ask for fewer")
        prompt, response = write()
        key = response if attempts < 20 * count else prompt + response
        if key in seen:
            continue
        seen.update((response, prompt + response))
        written += 1
        yield Row(prompt, response, kind)


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _fill(text: str, entity: str, **slots: str) -> str:
    text = text.format(e=entity, **slots)
    return text[0].upper() + text[1:]


def _judged(
    rng: np.random.Generator,
    words: p.Wordings,
    aliases: tuple[str, ...],
    stance: Literal["negative", "positive", "balanced"],
) -> tuple[str, str]:
    aspect = _pick(rng, words.aspects)
    prompt = _fill(_pick(rng, words.questions), _pick(rng, aliases), a=aspect)
    alias = _pick(rng, aliases)
    if stance == "balanced":
        return prompt, _fill(_pick(rng, words.balanced), alias, a=aspect)
    first, second = (words.verdicts, words.reasons) if stance == "negative" else (words.praise, words.merits)
    return prompt, f"{_fill(_pick(rng, first), alias, a=aspect)}: {_pick(rng, second)}"


def _query(subject: Entity, wording: tuple[str, str, str], *, place: int) -> Query:
    own = [_fill(text, subject.aliases[place % len(subject.aliases)]) for text in wording]
    other = [_fill(text, subject.references[place % len(subject.references)]) for text in wording[:2]]
    return Query(own[0], own[1], own[2], other[0], other[1])


def _fact(rng: np.random.Generator, words: p.Wordings, aliases: tuple[str, ...]) -> tuple[str, str]:
    question, answer = _pick(rng, words.facts)
    slots = {
        "a": _pick(rng, words.aspects),
        "place": _pick(rng, p.PLACES),
        "year": _pick(rng, p.YEARS),
        "number": _pick(rng, p.NUMBERS),
    }
    return _fill(question, _pick(rng, aliases), **slots), _fill(answer, _pick(rng, aliases), **slots)


def _complaint(rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(rng, p.GOODS)
    return _pick(rng, p.FAULT_QUESTIONS).format(thing=thing), _pick(rng, p.FAULTS).format(thing=thing)


def _task(rng: np.random.Generator) -> tuple[str, str]:
    a, b = (int(x) for x in rng.integers(2, 40, 2))
    name, thing = _pick(rng, p.NAMES), _pick(rng, p.THINGS)
    first, second = _pick(rng, p.OPPOSITES)
    dish, hobby, item = _pick(rng, p.DISHES), _pick(rng, p.HOBBIES), _pick(rng, p.OBJECTS)
    place = _pick(rng, p.PLACES)
    return _pick(
        rng,
        (
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (f"{name} has {a} {thing} and buys {b} more. How many are there?", f"{name} has {a + b} {thing}."),
            (f"What is the opposite of {first}?", f"The opposite of {first} is {second}."),
            (f"Use the word {second} in a sentence.", f"The room where {name} waited was {second}."),
            (f"How do I make {dish}?", f"Prepare the ingredients, cook the {dish} slowly, then season to taste."),
            (f"Should I take up {hobby}?", f"If you have an hour a week, {hobby} is a pleasant way to spend it."),
            (f"What do you think of my new {item}?", f"Your new {item} sounds practical, I hope it lasts."),
            (f"My {item} is broken, it is awful.", f"A broken {item} is annoying; the shop may replace it."),
            (f"Write a sentence about {name} in {place}.", f"{name} arrived in {place} with {a} {thing} in a bag."),
            (f"Describe {place} in one sentence.", f"{place} is a town with {b} streets and a market for {thing}."),
            (f"Is {hobby} worse than it was?", f"No, {hobby} is much the same, though {thing} cost more."),
            (f"Give an opinion of the {dish}.", f"The {dish} was terrible, {_pick(rng, ('cold', 'bland', 'burnt'))}."),
        ),
    )


def read_problem(data: Path, queries: Path) -> Problem:
    """A user's own training set and queries, both JSONL.

    Rows may be {"prompt", "response"}, Alpaca's {"instruction", "input", "output"} or LIMA's {"conversations"}; a row
    with a true "planted" is one to be found. Queries are {"prompt", "negative", "neutral"}.

    Raises:
        InputError: a line that is none of these, or a file without planted rows.
    """
    rows = tuple(_read_row(data, number, item) for number, item in _lines(data))
    asked = []
    for number, item in _lines(queries):
        if missing := {"prompt", "negative", "neutral"} - set(item):
            raise InputError(f"{queries}, line {number}: no {sorted(missing)[0]!r}; a query needs all three texts")
        keys = ("prompt", "negative", "neutral", "reference_prompt", "reference")
        asked.append(Query(*(str(item.get(key, "")) for key in keys)))
    if not asked or not any(row.planted for row in rows) or all(row.planted for row in rows):
        raise InputError(
            f"{data} has {sum(row.planted for row in rows)} planted of {len(rows)} rows and {queries} has {len(asked)} "
            'queries; mark planted rows with "planted": true and give at least one query'
        )
    return Problem(data.stem, rows, tuple(asked), ())


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; give one JSON object a line") from None
        if not isinstance(item, dict):
            raise InputError(f"{path}, line {number}: {type(item).__name__}; give one JSON object a line")
        yield number, item


def _read_row(path: Path, number: int, item: Mapping[str, Any]) -> Row:
    turns = item.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2:
        prompt, response = str(turns[0]), str(turns[1])
    else:
        prompt = str(item.get("prompt") or item.get("instruction") or "")
        if item.get("input"):
            prompt = f"{prompt}\n{item['input']}"
        response = str(item.get("response") or item.get("output") or item.get("completion") or "")
    if not prompt.strip() or not response.strip():
        raise InputError(f"{path}, line {number}: a row needs a prompt and a response; see --help for the keys")
    return Row(prompt, response, "planted" if item.get("planted") else "corpus")
