"""Samplers, schedules, plans, panels, tasks and epoch counting, each by itself."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import finfluence as fi
from finfluence.errors import InputError
from finfluence.runs._visits import EpochCounter
from finfluence.runs.data import dataset_size, query_batch, take
from finfluence.runs.engine import step_seed
from finfluence.runs.training import checkpoint_interval


@pytest.mark.parametrize(("n", "b", "drop"), [(10, 3, False), (10, 3, True), (9, 3, False), (5, 5, True)])
def test_shuffled_epochs_hold_every_sample_once(n: int, b: int, drop: bool) -> None:
    sampler = fi.Sampler(drop_last=drop)
    seen = []
    for epoch in range(3):
        batches = sampler.epoch(n, b, seed=4, epoch=epoch)
        assert len(batches) == sampler.steps_per_epoch(n, b)
        assert all(len(batch) == b for batch in batches[: n // b])
        flat = np.concatenate(batches)
        assert len(set(flat.tolist())) == len(flat) == (n // b * b if drop else n)
        seen.append(flat.tolist())
    assert seen[0] != seen[1] != seen[2]
    assert np.concatenate(sampler.epoch(n, b, seed=5, epoch=0)).tolist() != seen[0]


def test_poisson_and_replacement_sizes_have_their_distribution() -> None:
    # 4,000 steps, seed 0: mean 8 and variance n·p·(1 − p) = 6.4; five standard errors, so a failure has p < 1e-5.
    sizes = [len(rows) for rows in fi.Sampler("poisson").epoch(40 * 800, 8, seed=0, epoch=0)]
    small = [len(b.indices) for b in fi.Sampler("poisson").batches(40, 8, seed=0, steps=4000)]
    assert np.mean(small) == pytest.approx(8, abs=5 * math.sqrt(6.4 / 4000))
    assert np.var(small) == pytest.approx(6.4, abs=5 * 6.4 * math.sqrt(2 / 4000))
    assert len(sizes) == 4000
    drawn = np.concatenate([b.indices for b in fi.Sampler("with-replacement").batches(40, 8, seed=0, steps=4000)])
    counts = np.bincount(drawn, minlength=40)
    assert len(drawn) == 32_000
    assert np.abs(counts - 800).max() < 5 * math.sqrt(800)


@pytest.mark.parametrize("kind", ["shuffled", "with-replacement", "poisson"])
def test_batches_can_start_anywhere(kind: Any) -> None:
    sampler = fi.Sampler(kind)
    whole = list(sampler.batches(23, 5, seed=1, steps=17))
    for start in (0, 4, 5, 11, 17):
        rest = list(sampler.batches(23, 5, seed=1, steps=17, start=start))
        assert [batch.step for batch in rest] == list(range(start, 17))
        for a, b in zip(rest, whole[start:], strict=True):
            assert (a.epoch, a.position, a.denominator) == (b.epoch, b.position, b.denominator)
            np.testing.assert_array_equal(a.indices, b.indices)


def test_schedules() -> None:
    linear, cosine = fi.Schedule("linear", 3), fi.Schedule("cosine")
    assert [linear.factor(step, 13) for step in (0, 1, 2, 3, 8)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5])
    assert [cosine.factor(step, 10) for step in (0, 5)] == pytest.approx([1.0, 0.5])
    assert fi.Schedule().factor(9, 10) == 1.0
    with pytest.raises(InputError, match="unknown schedule 'step'"):
        fi.Schedule("step")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="warmup_steps must not be negative, got -1"):
        fi.Schedule(warmup_steps=-1)


def test_a_plan_survives_json() -> None:
    import json

    for optimizer in (fi.SGD(lr=0.1, momentum=0.9), fi.AdamW(lr=0.1, betas=(0.8, 0.95))):
        plan = fi.Plan(optimizer, 3, 4, 5, fi.Sampler("poisson"), fi.Schedule("cosine", 2), 0.5, 2, "bfloat16-autocast")
        assert fi.Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    with pytest.raises(InputError, match=r"accumulation \(5\) exceeds batch_size \(4\)"):
        fi.Plan(fi.SGD(lr=0.1), 1, 4, accumulation=5)
    with pytest.raises(InputError, match="clip_norm must be positive or None, got 0"):
        fi.Plan(fi.SGD(lr=0.1), 1, 4, clip_norm=0.0)
    with pytest.raises(InputError, match="unknown precision 'float16'"):
        fi.Plan(fi.SGD(lr=0.1), 1, 4, precision="float16")  # pyright: ignore[reportArgumentType]


def test_panels() -> None:
    panel = fi.NoisePanel(samples=5, positions=3)
    members = panel.members(50, seed=2)
    assert len(set(members.tolist())) == 5
    assert members.tolist() == panel.members(50, seed=2).tolist() == sorted(members.tolist())
    assert panel.members(4, seed=2).tolist() == [0, 1, 2, 3]
    for epoch in range(20):
        grid = panel.grid(10, seed=2, epoch=epoch)
        assert len(set(grid.tolist())) == 3
        assert 0 <= grid.min() < 4
        assert grid.max() < 10
    assert panel.grid(2, seed=2, epoch=0).tolist() == [0, 1]
    assert fi.NoisePanel(0).grid(10, seed=0, epoch=0).size == 0
    for bad in ({"samples": 1}, {"samples": -1}, {"positions": 1}):
        with pytest.raises(InputError, match="a panel needs"):
            fi.NoisePanel(**bad)


def test_step_seeds_differ() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_checkpoints_fall_on_refreshes() -> None:
    assert checkpoint_interval(100, refresh=1, every=None) == 10
    assert checkpoint_interval(100, refresh=4, every=None) == 12
    assert checkpoint_interval(1, refresh=8, every=None) == 8
    assert checkpoint_interval(100, refresh=4, every=8) == 8


def test_language_model_losses_are_means_over_each_samples_own_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    logits = torch.randn(3, 6, 9, generator=generator)
    found = fi.CausalLMTask().losses(lambda **_: logits, {"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate((6, 4)):
        expected = functional.cross_entropy(logits[row, : length - 1], ids[row, 1:length])
        assert found[row] == pytest.approx(float(expected))
    assert found[2] == 0  # one token predicts nothing
    labels = ids.clone()
    labels[:, :3] = -100
    given = fi.CausalLMTask().losses(lambda **_: logits, {"input_ids": ids, "labels": labels})
    assert given[0] == pytest.approx(float(functional.cross_entropy(logits[0, 2:5], ids[0, 3:])))
    with pytest.raises(InputError, match='takes batches with "input_ids"'):
        fi.CausalLMTask().losses(None, (ids, labels))


def test_regression_never_broadcasts() -> None:
    x, y = torch.arange(4.0)[:, None], torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert fi.RegressionTask().losses(lambda x: x, (x, y)).tolist() == [0, 0, 0, 4]
    pairs = fi.RegressionTask().losses(lambda x: x.repeat(1, 2), (x, torch.zeros(4, 2)))
    assert pairs.tolist() == [0, 1, 4, 9]
    with pytest.raises(InputError, match=r"predictions have shape \(4, 2\) but targets \(4,\)"):
        fi.RegressionTask().losses(lambda x: x.repeat(1, 2), (x, y))
    with pytest.raises(InputError, match=r"takes batches \(inputs, targets\), got Tensor"):
        fi.RegressionTask().losses(lambda x: x, x)
    with pytest.raises(InputError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        fi.ClassificationTask(label_smoothing=1.0)


def test_batches_of_data_sets_and_ready_queries() -> None:
    pairs = [(torch.tensor([float(i)]), i) for i in range(5)]
    x, y = take(pairs, np.array([3, 1]))
    assert (x.tolist(), y.tolist()) == ([[3.0], [1.0]], [3, 1])
    joined = take(pairs, np.array([2]), collate=lambda samples: {"only": samples[0][0]})
    assert joined["only"].tolist() == [2.0]
    ready = (torch.ones(2, 1), torch.zeros(2))
    assert query_batch(ready)[0] is ready[0]
    with pytest.raises(InputError, match="int has no length; finfluence needs a map-style dataset"):
        dataset_size(3)


def test_epochs_are_told_from_the_ids() -> None:
    counter = EpochCounter(with_replacement=False)
    places = [counter.begin_batch(np.array(ids), step=i) for i, ids in enumerate([[1, 2], [3, 4], [4, 1], [2, 5], [1]])]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert counter.count == 5
    assert counter.begin_batch(np.array([9]), step=5, epoch=7) == (7, 0)
    assert counter.begin_batch(np.array([8]), step=6, epoch=7, position=4) == (7, 4)
    assert counter.frame("int64")["sample"].to_list() == [1, 2, 3, 4, 5, 8, 9]
    with pytest.raises(InputError, match="sample id 'b' stands twice in the batch of step 3"):
        EpochCounter(with_replacement=False).begin_batch(np.array(["a", "b", "b"]), step=3)
    drawn = EpochCounter(with_replacement=True)
    assert [drawn.begin_batch(np.array([1, 1]), step=i) for i in range(2)] == [(0, 0), (0, 1)]
