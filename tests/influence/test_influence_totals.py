"""Totals against naive loops; the expectation that full totals promise, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from influence_simulation import panel_arrays, shuffle_run, signal_matrix

from finfluence.errors import InputError
from finfluence.influence import Panel, SampleTotals, ShuffledEpochs


def naive(step, code, value, n, centre):
    total, centred, visits = np.zeros(n), np.zeros(n), np.zeros(n)
    for t, i, x in zip(step, code, value, strict=True):
        batch = value[step == t]
        others = (batch.sum() - x) / (len(batch) - 1) if len(batch) > 1 else x
        mean = batch.mean() if centre == "batch" else others
        total[i] += x
        centred[i] += x - mean
        visits[i] += 1
    return visits, total, centred


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.floats(-5, 5)), min_size=2, max_size=60),
    centre=st.sampled_from(["batch", "others"]),
    offset=st.sampled_from([0, 10**9]),
    stride=st.sampled_from([1, 10**6]),
)
def test_from_signals_equals_a_loop(rows, centre, offset, stride):
    step, code, value = (np.array(column) for column in zip(*rows, strict=True))
    step = offset + stride * step.astype(np.int64)
    if np.unique(step, return_counts=True)[1].max() < 2:
        with pytest.raises(InputError, match="one sample"):
            SampleTotals.from_signals(step, code, value=value, n_samples=10)
        return
    found = SampleTotals.from_signals(step, code, value=value, n_samples=10, centre=centre)
    for got, expected in zip(
        (found.visits, found.total, found.centred), naive(step, code, value, 10, centre), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_float32_signals_are_summed_in_float64():
    value = np.full(2_000_000, 0.1, dtype=np.float32)
    step = np.repeat(np.arange(1_000_000), 2)
    found = SampleTotals.from_signals(step, np.tile([0, 1], 1_000_000), value=value, n_samples=2)
    assert found.total.dtype == np.float64
    assert found.total[0] == pytest.approx(1e6 * float(np.float32(0.1)), rel=1e-12)


def test_parts_of_a_run_add_up():
    rng = np.random.default_rng(0)
    step, code, value = shuffle_run(rng, signal_matrix(rng, 43, 18), 8, 3)
    whole = SampleTotals.from_signals(step, code, value=value, n_samples=43)
    parts = [
        SampleTotals.from_signals(step[part], code[part], value=value[part], n_samples=43)
        for part in (step < 5, (step >= 5) & (step < 14), step >= 14)
    ]
    added = parts[0] + parts[1] + parts[2]
    for name in ("visits", "total", "centred", "batch"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name))
    with pytest.raises(InputError, match="cannot be added"):
        whole + SampleTotals.from_signals(step, code, value=value, n_samples=43, centre="others")


def full_totals(matrix, batch, epochs, grid, *, drop_last=False, **options):
    n = len(matrix)
    epoch, position, code, value = panel_arrays(
        matrix, batch, epochs, samples=np.arange(n), grid=grid, drop_last=drop_last
    )
    panel = Panel.from_flat(epoch, position, code=code, value=value)
    return SampleTotals.from_panel(panel, ShuffledEpochs(n, batch, drop_last), **options)


@pytest.mark.parametrize(("n", "drop_last"), [(40, False), (43, False), (43, True)])
@pytest.mark.parametrize("centre", ["batch", "others"])
def test_full_totals_are_the_expectation_over_shuffles(n, drop_last, centre):
    # Seed 3, 6000 shuffles: each mean total within 5.5 standard errors (86 comparisons, failure below 1e-5).
    rng = np.random.default_rng(3)
    per_epoch = n // 8 if drop_last else -(-n // 8)
    matrix = signal_matrix(rng, n, 2 * per_epoch)
    full = full_totals(matrix, 8, 2, np.arange(per_epoch), drop_last=drop_last, centre=centre)
    assert full.centred_variance is not None
    assert full.centred_variance.max() == 0
    assert full.batch == n
    runs = []
    for _ in range(6000):
        step, code, value = shuffle_run(rng, matrix, 8, 2, drop_last=drop_last)
        batch = SampleTotals.from_signals(step, code, value=value, n_samples=n, centre=centre)
        runs.append((batch.total, batch.centred))
    mean, error = np.mean(runs, axis=0), np.std(runs, axis=0) / np.sqrt(len(runs))
    assert (np.abs(mean[0] - full.total) < 5.5 * error[0]).all()
    # The mean of the others is unbiased; the batch's own mean shrinks by 1 − 1/b (b = 8, less in a short batch).
    if centre == "others":
        assert (np.abs(mean[1] - full.centred) < 5.5 * error[1]).all()
    else:
        slope = np.polyfit(full.centred, mean[1], 1)[0]
        assert 0.8 < slope < 0.93


@pytest.mark.parametrize("positions", ["random", "regular"])
def test_the_grid_error_is_that_of_repeated_grids(positions):
    # Seed 4, 1500 grids. Random: unbiased. Regular: one position a stratum, which collapsed strata bound from above.
    rng = np.random.default_rng(4)
    n, per_epoch = 120, 24
    matrix = signal_matrix(rng, n, per_epoch)
    values, stated = [], []
    for _ in range(1500):
        grid = (
            rng.choice(per_epoch, 6, replace=False)
            if positions == "random"
            else np.arange(6) * 4 + rng.integers(0, 4, 6)
        )
        totals = full_totals(matrix, 5, 1, np.sort(grid), positions="random")
        shown = full_totals(matrix, 5, 1, np.sort(grid), positions=positions)
        values.append((totals.total, totals.centred))
        common = shown.common_error**2 * (shown.centred**2).sum()
        stated.append((shown.total_variance.sum(), shown.centred_variance.sum() + common))
    ratio = np.var(values, axis=0).sum(1) / np.mean(stated, axis=0)
    if positions == "random":
        np.testing.assert_allclose(ratio, 1, atol=0.1)
    else:
        assert (ratio < 1.05).all()
        assert (ratio > 0.6).all()


def test_full_totals_need_every_sample():
    matrix = signal_matrix(np.random.default_rng(0), 20, 10)
    epoch, position, code, value = panel_arrays(matrix, 4, 2, samples=np.arange(19), grid=np.arange(5))
    panel = Panel.from_flat(epoch, position, code=code, value=value)
    with pytest.raises(InputError, match="19 of 20"):
        SampleTotals.from_panel(panel, ShuffledEpochs(20, 4))


def test_totals_check_their_lengths_and_choices():
    with pytest.raises(InputError, match="3, 3 and 2"):
        SampleTotals(np.ones(3), np.ones(3), np.ones(2))
    with pytest.raises(InputError, match="'median'"):
        SampleTotals.from_signals([0, 0], [0, 1], value=[1.0, 2.0], n_samples=2, centre="median")  # pyright: ignore
