"""The comparison of a language model's μ with retraining: its groups, its models, and its tables on a small problem."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.poison.data import SIZES, make_problem
from benchmarks.poison.model import AdaptedModel, Adapters
from benchmarks.poison_truth import RANDOM, Start, agreements, certain, effects, estimates, groups
from poison_tiny import tiny_llama

import finfluence as fi
from finfluence.workflows.digits import digits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_groups_are_the_kinds_of_some_size_half_of_the_planted_and_random_rows() -> None:
    problem = make_problem("politician", SIZES["cpu"])
    found = groups(problem)
    assert {name: len(rows) for name, rows in found.items() if not name.startswith("random")} == {
        "complaint": 28,
        "neutral": 40,
        "other-positive": 60,
        "planted": 35,
        "half of the planted": 17,
    }
    assert found["planted"] == np.flatnonzero(problem.planted).tolist()
    assert set(found["half of the planted"]) < set(found["planted"])
    random = [found[f"random {k}"] for k in range(1, RANDOM + 1)]
    assert {len(set(rows)) for rows in random} == {27}
    assert len({tuple(rows) for rows in random}) == RANDOM
    assert groups(problem) == found


def test_every_training_starts_from_the_same_adapters(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    adapters = Adapters(layers=2, rank=2)
    start = pickle.loads(pickle.dumps(Start(tmp_path, adapters)))
    expected = AdaptedModel(tmp_path, adapters, seed=1).trainable()
    top = start(7)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    again = {name: p for name, p in start(8).named_parameters() if p.requires_grad}
    assert again.keys() == expected.keys()
    for name, parameter in again.items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


def test_tables_hold_estimates_beside_what_was_measured(tmp_path: Path) -> None:
    recipe = digits(samples=80, epochs=2, batch_size=8, hidden=8)
    queries: dict[str, Any] = dict.fromkeys(("negative", "contrast"), recipe.queries["validation"])
    subsets = {name: list(range(start, start + 8)) for name, start in (("a", 0), ("b", 20), ("c", 50))}
    runs = [
        recipe.train(tmp_path / f"run{seed}", queries=queries, seed=seed, sensitivity="replay", show_progress="never")
        for seed in (1, 2)
    ]
    truth = fi.retrain(
        recipe.task,
        recipe.make_model,
        recipe.dataset,
        queries,
        subsets=subsets,
        optimizer=recipe.plan.optimizer,
        epochs=2,
        batch_size=8,
        runs=8,
        directory=tmp_path / "truth",
        progress=False,
    )
    found = {"one run": [estimates(run, truth.queries, subsets) for run in runs]}
    (row,) = agreements("digits", truth, found, truth.queries)
    assert row["retrainings"] == 8
    assert row["groups"] == 3
    assert 0.0 <= row["coverage"] <= 1.0
    rows = effects("digits", truth, found, subsets)
    assert [(r["query"], r["group"]) for r in rows[:4]] == [
        (q, g) for q, g in zip(["negative"] * 3 + ["contrast"], "abca", strict=True)
    ]
    assert recipe.samples is not None
    single = certain("digits", recipe.samples["planted"].to_numpy(), {"one run": runs})
    assert [r["query"] for r in single] == ["negative", "contrast"]
    assert 0 <= single[0]["lowest"] <= single[0]["found"] <= single[0]["flagged"] <= 80
    frame = runs[0].influence("negative", subsets=subsets)
    for at, r in enumerate(rows[:3]):
        assert r["one run"] == pytest.approx([frame[key][at] for key in ("mu", "ci_low", "ci_high")])
        measured = truth.influence("negative")
        assert r["measured"] == pytest.approx([measured[key][at] for key in ("mu", "ci_low", "ci_high")])
        assert r["one run"][1] < r["one run"][0] < r["one run"][2]
