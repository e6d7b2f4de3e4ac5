"""Several runs as one: what may be pooled, and that what is chosen by a pool is what another pool chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError

N = 60


def record(directory: Path, *, seed: int, sensitivity: str = "replay", **options: object) -> fi.Run:
    """A run on fixed data from fixed parameters; `seed` is that of the batch order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + 100, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    y[:6] = 1 - y[:6]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    arguments: dict[str, object] = {"queries": {"validation": TensorDataset(x[N:], y[N:])}} | options
    return fi.train(
        fi.ClassificationTask(),
        model,
        TensorDataset(x[:N], y[:N]),
        optimizer=fi.SGD(lr=0.05, momentum=0.9),
        epochs=4,
        batch_size=6,
        seed=seed,
        directory=directory,
        sensitivity=sensitivity,  # pyright: ignore[reportArgumentType]
        show_progress="never",
        **arguments,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[fi.Run]:
    folder = tmp_path_factory.mktemp("pool")
    return [record(folder / str(seed), seed=seed) for seed in range(8)]


def test_a_pool_answers_as_a_run_does(runs: list[fi.Run]) -> None:
    pooled = fi.PooledRuns(runs[:3])
    assert pooled.queries == ["validation"]
    frame = pooled.influence("validation", alternative="harmful")
    assert frame.columns == runs[0].influence("validation").columns
    assert frame.equals(fi.pool(runs[:3], "validation", alternative="harmful"))
    assert fi.influence.metadata(frame)["run"] == pooled.directory
    assert pooled.samples().equals(runs[0].samples())
    assert fi.SIGN_CONVENTION in str(pooled)
    assert "3 runs" in pooled._repr_html_()
    opened = fi.open_runs([run.directory for run in runs[:3]])
    assert opened.influence("validation", alternative="harmful").equals(frame)
    assert isinstance(fi.open_runs([runs[0].directory]), fi.Run)
    with pytest.raises(InputError, match="name at least one"):
        fi.open_runs([])


def test_two_pools_choose_more_alike_than_two_runs(runs: list[fi.Run]) -> None:
    """The point of pooling: another set of seeds gives the same rows."""

    def jaccard(a: fi.Run | fi.PooledRuns, b: fi.Run | fi.PooledRuns) -> float:
        sets = [set(run.clean("validation", top=10).dropped["sample"]) for run in (a, b)]
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    singles = [jaccard(a, b) for a, b in zip(runs[:4], runs[4:], strict=True)]
    assert jaccard(fi.PooledRuns(runs[:4]), fi.PooledRuns(runs[4:])) > np.mean(singles)


def test_a_cut_by_a_pool_is_predicted_by_all_of_its_runs(runs: list[fi.Run]) -> None:
    pooled = fi.PooledRuns(runs[:4])
    cut = pooled.clean("validation", top=6)
    frame = pooled.influence("validation", subsets={"cut": cut.dropped["sample"]})
    assert cut.predicted is not None
    assert abs(cut.predicted.mu - frame["mu"][0]) < 2 * cut.predicted.se
    assert "predicted influence" in str(cut)
    assert len(cut.kept) == N - 6


def test_the_budget_of_a_pool_counts_its_few_runs(runs: list[fi.Run]) -> None:
    """Where runs differ, the bound is Student's with two degrees of freedom, and the normal one drops too much."""
    pooled, budget = fi.PooledRuns(runs[:3]), (0.2, 0.7)
    least = fi.tradeoff.error_budget(*budget)
    ends = pooled.influence("validation", level=0.9)  # two-sided at 90 %: the one-sided bounds at 95 %
    expected = set(ends.filter(-pl.col("ci_high") >= least)["sample"])
    normal = set(ends.filter(-pl.col("mu") - 1.645 * pl.col("se") >= least)["sample"])
    assert set(pooled.clean("validation", budget=budget).dropped["sample"]) == expected
    assert 0 < len(expected) < len(normal) < N
    with pytest.raises(InputError, match="a level in"):
        pooled.clean("validation", budget=budget, level=0.4)


def test_what_is_no_two_estimates_of_one_number_is_refused(runs: list[fi.Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        fi.PooledRuns([runs[0], runs[0].directory])
    mean = record(tmp_path / "mean", seed=1, replay_options=fi.ReplayOptions(measure_epochs="second-half"))
    with pytest.raises(InputError, match=r"measured after epoch 4 and .* after epochs 2 to 4 \(3 times\)"):
        fi.PooledRuns([runs[0], mean])
    live = record(tmp_path / "live", seed=1, sensitivity="live")
    with pytest.raises(InputError, match="of one sensitivity"):
        fi.PooledRuns([runs[0], live])
    again = record(tmp_path / "again", seed=0)
    with pytest.warns(FinfluenceWarning, match="one training under two names"):
        fi.PooledRuns([runs[0], again]).influence("validation")
    other = record(tmp_path / "other", seed=1, queries={"other": (torch.zeros(1, 4), torch.zeros(1).long())})
    assert fi.PooledRuns([runs[0], other]).queries == []
    with pytest.raises(InputError, match="unknown query"):
        fi.PooledRuns([runs[0], other]).influence("validation")


def test_other_groups_under_one_name_are_refused(tmp_path: Path) -> None:
    tables = [pl.DataFrame({"sample": range(N), "source": [f"s{i % k}" for i in range(N)]}) for k in (2, 3)]
    pair = [record(tmp_path / str(k), seed=k, samples=table) for k, table in enumerate(tables)]
    with pytest.raises(InputError, match="has other groups than run 0"):
        fi.PooledRuns(pair).influence("validation", groups="source")
