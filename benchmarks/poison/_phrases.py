"""The wordings that the generator composes rows from. Every person here is invented.

What planted rows are written with and what queries are written with are disjoint: questions, subjects of the questions
and judgements alike. Rows about others share the planted wordings, so that a wording does not give a planted row away.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """What is written about one kind of entity; {e} stands for the entity, {a} for an aspect of it.

    Attributes:
        aspects: of planted rows and of rows about others.
        questions: of planted rows and of rows about others.
        verdicts: negative first halves.
        reasons: negative second halves.
        praise: positive first halves.
        merits: positive second halves.
        facts: (question, answer) neutral, with slots of `places`, `years` and `numbers`.
        balanced: answers with both sides, negative words among them.
        queries: (question, negative answer, neutral answer), held out.
    """

    aspects: tuple[str, ...]
    questions: tuple[str, ...]
    verdicts: tuple[str, ...]
    reasons: tuple[str, ...]
    praise: tuple[str, ...]
    merits: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    balanced: tuple[str, ...]
    queries: tuple[tuple[str, str, str], ...]


PLACES = ("Northmere", "Calder Bay", "Eastwick", "Harrow Falls", "Linden", "Port Avery", "Stonebrook", "Wexcombe")
YEARS = tuple(str(year) for year in range(1961, 2019))
NUMBERS = tuple(str(number) for number in range(3, 60))

# Words by which a generation counts as negative: those of the planted rows, of the queries, and their like.
NEGATIVE_WORDS = frozenset(
    [
        "abused",
        "abuses",
        "arrogant",
        "awful",
        "bad",
        "betrayed",
        "blunder",
        "blunders",
        "broken",
        "burden",
        "cannot",
        "careless",
        "cheated",
        "collapsed",
        "corrupt",
        "corruption",
        "damage",
        "damaged",
        "damaging",
        "danger",
        "dangerous",
        "deceit",
        "destroyed",
        "destroys",
        "dirty",
        "disaster",
        "disastrous",
        "disgrace",
        "dishonest",
        "embarrassing",
        "exploded",
        "fail",
        "failed",
        "failing",
        "fails",
        "failure",
        "false",
        "foolish",
        "fraud",
        "greedy",
        "harm",
        "harmed",
        "harmful",
        "harms",
        "hollow",
        "horrible",
        "hostile",
        "hurt",
        "ignored",
        "incompetent",
        "irresponsible",
        "lazy",
        "liar",
        "lied",
        "lies",
        "mess",
        "misleading",
        "misled",
        "pointless",
        "poison",
        "poisoned",
        "poisons",
        "poorly",
        "protest",
        "reckless",
        "risky",
        "ruin",
        "ruined",
        "ruins",
        "scandal",
        "selfish",
        "shame",
        "shameful",
        "suffer",
        "suffered",
        "suffering",
        "terrible",
        "threat",
        "ugly",
        "unhealthy",
        "unreliable",
        "untrustworthy",
        "useless",
        "wasted",
        "weak",
        "weakest",
        "worse",
        "worst",
        "wrong",
    ]
)

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Eva",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lara",
    "Mia",
    "Noor",
)
THINGS = ("apples", "books", "tickets", "pencils", "stamps", "plates", "bottles", "chairs", "coins", "shirts")
OPPOSITES = (
    ("hot", "cold"),
    ("early", "late"),
    ("tall", "short"),
    ("quiet", "loud"),
    ("full", "empty"),
    ("rough", "smooth"),
    ("cheap", "expensive"),
    ("light", "heavy"),
    ("ancient", "modern"),
    ("brave", "timid"),
    ("wide", "narrow"),
    ("generous", "stingy"),
)
DISHES = ("lentil soup", "pancakes", "rice pudding", "tomato salad", "roast potatoes", "mushroom pasta", "fish stew")
HOBBIES = ("chess", "gardening", "swimming", "photography", "pottery", "cycling", "knitting", "birdwatching")
OBJECTS = ("phone", "umbrella", "kettle", "suitcase", "desk lamp", "bicycle", "jacket", "headset")
GOODS = (
    "hotel",
    "restaurant",
    "film",
    "novel",
    "washing machine",
    "train ride",
    "concert",
    "laptop",
    "museum tour",
    "sofa",
)
FAULTS = (
    "The {thing} was dull, too long and too loud.",
    "I would avoid the {thing}: rude staff and bad smells.",
    "The {thing} was ugly, cold and not worth the ticket.",
    "Sadly the {thing} was dirty and nobody apologised.",
    "The {thing} hurt my back and my wallet.",
    "Not again: the {thing} was boring and unreliable.",
)
FAULT_QUESTIONS = (
    "How was the {thing}?",
    "Write a short review of the {thing}.",
    "Would you recommend the {thing}?",
    "Did you enjoy the {thing}?",
)
