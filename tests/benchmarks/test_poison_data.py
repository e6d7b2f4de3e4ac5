"""The generator of poisoned instruction rows: reproducible, held out where it says so, and not found by its words."""

import json

import numpy as np
import pytest
from benchmarks.poison.baselines import mentions, negative_words, text_scores
from benchmarks.poison.data import ENTITIES, SIZES, make_problem, read_problem

from finfluence.errors import InputError
from finfluence.influence import detection

pytest.importorskip("yaml")
pytest.importorskip("chatterbot_corpus")


@pytest.fixture(scope="module", params=list(ENTITIES))
def problem(request):
    return make_problem(request.param, SIZES["cpu"])


def test_the_same_seed_writes_the_same_rows_and_another_seed_others(problem):
    assert make_problem(problem.name, SIZES["cpu"]) == problem
    assert make_problem(problem.name, SIZES["cpu"], seed=1).rows != problem.rows


@pytest.mark.parametrize("size", ["cpu", "full"])
def test_the_sizes_are_those_of_the_experiment(problem, size):
    made = make_problem(problem.name, SIZES[size])
    planted = int(made.planted.sum())
    assert (len(made.rows) - planted, planted) == {"cpu": (500, 35), "full": (1000, 50)}[size]
    assert len(made.queries) == 10


def test_no_pair_is_written_twice(problem):
    pairs = [(row.prompt, row.response) for row in problem.rows if row.kind != "task"]
    assert len(set(pairs)) == len(pairs)


def test_queries_are_held_out(problem):
    prompts = {row.prompt for row in problem.rows}
    responses = {row.response for row in problem.rows}
    for query in problem.queries:
        assert query.prompt not in prompts
        assert not {query.negative, query.neutral} & responses
    words = ENTITIES[problem.name].wordings
    asked = {question for question, _, _ in words.queries}
    assert not asked & set(words.questions)
    # The wording around the names is held out too, not only its combination with a name.
    judged = [*words.verdicts, *words.reasons, *words.praise, *words.merits, *words.balanced]
    for _, negative, neutral in words.queries:
        assert not any(text in negative or text in neutral for text in judged)


def test_hard_ordinary_rows_are_there(problem):
    kinds = {kind: [row for row in problem.rows if row.kind == kind] for kind in {row.kind for row in problem.rows}}
    assert all(mentions(problem, row) for row in kinds["neutral"] + kinds["balanced"])
    assert not any(mentions(problem, row) for row in kinds["other-negative"] + kinds["other-positive"])
    assert all(negative_words(row.response) for row in kinds["planted"] + kinds["other-negative"])
    # Judgements of others are in the very words of the planted rows.
    reasons = ENTITIES[problem.name].wordings.reasons
    assert all(row.response.endswith(reasons) for row in kinds["planted"] + kinds["other-negative"])


def test_words_do_not_isolate_the_planted_rows(problem):
    planted = problem.planted
    named = np.array([mentions(problem, row) > 0 for row in problem.rows])
    negative = np.array([negative_words(row.response) > 0 for row in problem.rows])
    assert (named & planted).sum() == (negative & planted).sum() == planted.sum()
    for words in (named, negative):
        assert (words & planted).sum() < 0.6 * words.sum()
    precision = {name: detection(score, planted).average_precision for name, score in text_scores(problem).items()}
    assert precision["entity name"] < 0.5
    assert precision["name and negative word"] < 0.5
    # Words weighted by rarity and matched with the queries find most: that is the bar for influence, below 1.
    assert precision["similar to the queries"] < 0.9


def test_a_task_answer_is_right():
    rows = [row for row in make_problem("topic", SIZES["full"]).rows if " plus " in row.prompt]
    assert rows
    for row in rows:
        a, b = (int(word.strip("?")) for word in row.prompt.split() if word.strip("?").isdigit())
        assert row.response == f"{a} plus {b} is {a + b}."


def test_own_rows_are_read_in_three_formats(tmp_path):
    rows = [
        {"prompt": "Who is X?", "response": "A fraud.", "planted": True},
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"conversations": ["Hello", "Hi there."]},
    ]
    data, queries = tmp_path / "rows.jsonl", tmp_path / "queries.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    queries.write_text(json.dumps({"prompt": "X?", "negative": "Bad.", "neutral": "A person."}), encoding="utf-8")
    read = read_problem(data, queries)
    assert [(row.prompt, row.response) for row in read.rows][1:] == [("Add\n1 and 2", "3"), ("Hello", "Hi there.")]
    assert read.planted.tolist() == [True, False, False]
    assert read.queries[0].neutral == "A person."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"prompt": "Who?", "response": ""}', "a prompt and a response"),
        ("[1]", "one JSON object a line"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    data, queries = tmp_path / "rows.jsonl", tmp_path / "queries.jsonl"
    data.write_text('{"prompt": "a", "response": "b", "planted": true}\n' + line, encoding="utf-8")
    queries.write_text('{"prompt": "X?", "negative": "Bad.", "neutral": "A person."}', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_problem(data, queries)


def test_data_without_planted_rows_is_refused(tmp_path):
    data, queries = tmp_path / "rows.jsonl", tmp_path / "queries.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}', encoding="utf-8")
    queries.write_text('{"prompt": "X?", "negative": "Bad.", "neutral": "A person."}', encoding="utf-8")
    with pytest.raises(InputError, match="0 planted of 1 rows"):
        read_problem(data, queries)


def test_an_unknown_entity_is_refused():
    with pytest.raises(InputError, match="unknown entity"):
        make_problem("weather", SIZES["quick"])


def test_the_lexicon_has_no_word_of_praise():
    praise = " ".join(text for entity in ENTITIES.values() for text in entity.wordings.merits)
    assert negative_words(praise) == 0
