"""Watched subsets: the observations of f-INE's first stage are what their definition says."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from runs_problems import N, bare_training, data, gradients, model, queries, record, sample_loss, sensitivity
from torch.nn import functional

import finfluence as fi
from finfluence.errors import InputError
from finfluence.influence import two_stage

WATCH = {"few": [1, 5, 7], "many": list(range(10, 25))}


def naive(plan: fi.Plan) -> dict[tuple[int, str, str], float]:
    """⟨q_t, mean of ∇ℓ_i⟩ over B_t ∪ S and over B_t ∖ S, sample by sample."""
    net, dataset = model(2), data()
    optimizer = plan.optimizer.build(list(net.parameters()))
    x, y = queries()["second"]
    found: dict[tuple[int, str, str], float] = {}

    def mean(direction: list[torch.Tensor], rows: list[int]) -> float:
        if not rows:
            return float("nan")
        loss = torch.cat([sample_loss(net, dataset, row)[None] for row in rows]).mean()
        return sum(float((q * g).sum()) for q, g in zip(direction, gradients(net, loss), strict=True))

    def before_step(step: int, rows: np.ndarray, denominator: float) -> None:
        direction = sensitivity(optimizer, net, gradients(net, functional.cross_entropy(net(x), y)))
        batch = set(rows.tolist())
        for name, members in WATCH.items():
            found[step, name, "with"] = mean(direction, sorted(batch | set(members)))
            found[step, name, "without"] = mean(direction, sorted(batch - set(members)))

    bare_training(net, optimizer, plan, dataset=dataset, before_step=before_step)
    return found


@pytest.mark.parametrize("optimizer", [fi.SGD(lr=0.1, momentum=0.9), fi.AdamW(lr=0.02)], ids=["sgd", "adamw"])
def test_observations_equal_a_naive_loop(tmp_path: Path, optimizer: Any) -> None:
    # Batches of 2 of 42 with 15 watched: some step's batch lies within the subset (asserted).
    plan = fi.Plan(optimizer=optimizer, epochs=2, batch_size=2)
    run = record(tmp_path / "run", model(2), optimizer=optimizer, epochs=2, batch_size=2, watch=WATCH)
    expected = naive(plan)
    frame = run.store.watch().collect()
    assert frame.columns == ["step", "subset", "arm", "first", "second"]
    assert frame.height == len(expected) == 42 * 4
    values = np.array([expected[key] for key in frame.select("step", "subset", "arm").iter_rows()])
    assert np.isnan(values).any()
    np.testing.assert_allclose(frame["second"].to_numpy(), values, rtol=1e-5, atol=1e-12)


def test_an_auxiliary_model_trains_on_the_rest_and_sharpens_the_estimate(tmp_path: Path) -> None:
    run = record(tmp_path / "run", model(2), watch=WATCH, auxiliary="train", epochs=4)
    frame = run.store.watch().collect()
    assert set(frame["arm"].unique()) == {"with", "without", "auxiliary"}
    table = run.influence("first", subsets=["many", "few"], estimator="median")
    assert table["subset"].to_list() == ["many", "few"]
    assert table["size"].to_list() == [15, 3]
    arms = {
        arm: frame.filter(pl.col("subset") == "many", pl.col("arm") == arm).sort("step")["first"].to_numpy()
        for arm in ("with", "without", "auxiliary")
    }
    kept = np.isfinite(arms["without"])
    direct = two_stage(arms["with"][kept], arms["without"][kept], auxiliary=arms["auxiliary"][kept])
    assert table["mu"][0] == pytest.approx(direct.mu)


def test_an_auxiliary_model_never_sees_the_subset(tmp_path: Path) -> None:
    # Moving the subset changes its gradients, so that an auxiliary model that used them would give other signals.
    clean, poisoned = data(), data()
    observed = []
    for number, dataset in enumerate((clean, poisoned)):
        if dataset is poisoned:
            dataset.tensors[0][WATCH["few"]] += 3.0
        run = record(
            tmp_path / str(number), model(2), dataset=dataset, watch={"few": WATCH["few"]}, auxiliary="train", epochs=2
        )
        observed.append(run.store.watch().filter(pl.col("arm") == "auxiliary").collect())
    assert observed[0].equals(observed[1])


def test_what_watching_cannot_do(tmp_path: Path) -> None:
    run = record(tmp_path / "run", watch={"few": WATCH["few"]}, epochs=2)
    with pytest.raises(InputError, match=r"subset 'many' was not watched \(watched: few\)"):
        run.influence("first", subsets=["many"], estimator="max")
    with pytest.raises(InputError, match="the gaussian estimator takes ids"):
        run.influence("first", subsets=["few"])
    with pytest.raises(InputError, match="unknown auxiliary 'yes'; choose one of none, train"):
        record(tmp_path / "b", watch={"few": [1]}, auxiliary="yes")
    with pytest.raises(
        InputError,
        match=r"without watched subset 'most' 4 samples are left for its auxiliary model, fewer than batch_size",
    ):
        record(tmp_path / "b", watch={"most": range(N - 4)}, auxiliary="train")
    assert not (tmp_path / "b").exists()
