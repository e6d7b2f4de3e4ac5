"""Kriged totals against known curves: unbiased over shuffles, better than plain sums, with errors that cover."""

from typing import Any

import numpy as np
import pytest
from influence_simulation import panel_arrays, positions, shuffle_run

from finfluence.influence import Panel, SampleTotals, ShuffledEpochs, kriged, shuffled_noise, spread, successive_noise

N, BATCH, EPOCHS, MEMBERS = 203, 20, 5, 48


def curves(rng, *, rough=0.0, n=N, per_epoch=None):
    """(n, T) smooth curves of four shapes and very different sizes, a drift that all share, and noise."""
    steps = EPOCHS * (per_epoch or positions(N, BATCH))
    time = np.linspace(0, 1, steps)
    shapes = np.array([np.ones(steps), np.exp(6 * (time - 1)), np.sin(5 * time), np.exp(20 * (time - 1))])
    size = rng.gamma(1.0, size=(n, 1)) + 0.05
    own = size * (rng.normal(size=(n, 4)) @ shapes + rough * rng.normal(size=(n, steps)))
    return (own + 2 * np.cos(2 * time)) / n


def truth(matrix):
    """(n,) what a sample's centred total is on average over shuffles: against the others, a slot of n in each epoch."""
    totals = BATCH * matrix.sum(axis=1) / len(matrix)
    return (totals - totals.mean()) * len(matrix) / (len(matrix) - 1)


def panel_of(rng, matrix, *, members: Any = MEMBERS, drop_last=False, grid=None):
    chosen = members if isinstance(members, np.ndarray) else np.sort(rng.choice(len(matrix), members, replace=False))
    places = (
        grid
        if grid is not None
        else (lambda _: np.arange(rng.integers(3), positions(N, BATCH, drop_last=drop_last), 3))
    )
    flat = panel_arrays(matrix, BATCH, EPOCHS, samples=chosen, grid=places, drop_last=drop_last)
    return Panel.from_flat(flat[0], flat[1], code=flat[2], value=flat[3])


def estimate(rng, matrix, panel, *, drop_last=False):
    """One shuffled run's kriged totals and noise, its plain totals, and the panel's own noise."""
    sampler = ShuffledEpochs(N, BATCH, drop_last)
    step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS, drop_last=drop_last)
    noise = shuffled_noise(panel, sampler, epochs=EPOCHS, positions="regular")
    plain = SampleTotals.from_signals(step, code, value=value, n_samples=N, centre="others")
    found = kriged(
        step, code, value=value, panel=panel, sampler=sampler, noise=noise, epochs=EPOCHS, positions="regular"
    )
    like = successive_noise(step, code, value=value, n_samples=N)
    return found, plain, spread(noise, like)


@pytest.mark.parametrize("drop_last", [False, True])
def test_kriged_totals_are_unbiased_and_better_and_their_errors_cover(drop_last):
    """40 runs of one problem, each with a panel of its own (seed 0): sums over random and over coherent subsets.

    Bounds are 5 standard errors of the simulation; a fault shows as a bias of a tenth or an error twice too small.
    """
    rng = np.random.default_rng(0)
    per_epoch = positions(N, BATCH, drop_last=drop_last)
    matrix = curves(rng, rough=0.1, per_epoch=per_epoch)
    expected = truth(matrix)
    subsets = [rng.choice(N, 15, replace=False) for _ in range(20)] + [np.argsort(expected)[:15]]
    target = np.array([expected[s].sum() for s in subsets])
    sums, plains, errors = [], [], []
    for _ in range(40):
        panel = panel_of(rng, matrix, drop_last=drop_last)
        found, plain, _ = estimate(rng, matrix, panel, drop_last=drop_last)
        assert found is not None
        totals, _ = found
        assert totals.centred_variance is not None
        sums.append([totals.centred[s].sum() for s in subsets])
        plains.append([plain.centred[s].sum() for s in subsets])
        errors.append([np.sqrt(totals.centred_variance[s].sum()) for s in subsets])
    off, plain_off, errors = np.array(sums) - target, np.array(plains) - target, np.array(errors)
    assert (np.abs(off.mean(axis=0)) < 5 * off.std(axis=0) / np.sqrt(40)).all()
    assert (off[:, :20] ** 2).mean() < 0.8 * (plain_off[:, :20] ** 2).mean()
    assert 0.89 < (np.abs(off[:, :20]) < 1.96 * errors[:, :20]).mean() < 0.99


def test_the_noise_is_nearer_to_that_of_all_samples_than_the_panels():
    """30 panels (seed 1) of samples of very different sizes: log σ² errs at most two thirds as much."""
    rng = np.random.default_rng(1)
    matrix = curves(rng)
    whole = np.arange(positions(N, BATCH))  # every position, so that the samples are all that differs
    every = panel_of(rng, matrix, members=np.arange(N), grid=whole)
    known = shuffled_noise(every, ShuffledEpochs(N, BATCH), epochs=EPOCHS)
    assert known.per_sample is not None
    off, plain_off, claimed, shares = [], [], [], []
    for _ in range(30):
        found, _, panel_noise = estimate(rng, matrix, panel_of(rng, matrix, grid=whole))
        assert found is not None
        noise = found[1]
        assert noise.per_sample is not None
        assert panel_noise.per_sample is not None
        assert noise.per_sample.sum() == pytest.approx(noise.variance)
        off.append(np.log(noise.variance / known.variance))
        plain_off.append(np.log(panel_noise.variance / known.variance))
        claimed.append(noise.relative_error)
        both = (noise.per_sample, panel_noise.per_sample)
        shares.append([np.corrcoef(own, known.per_sample)[0, 1] for own in both])
    rms = np.sqrt(np.mean(np.square(off)))
    assert rms < np.sqrt(np.mean(np.square(plain_off))) * 2 / 3
    assert 0.6 < np.mean(claimed) / rms < 2.0
    kriged_share, successive_share = np.mean(shares, axis=0)
    assert kriged_share > max(0.9, successive_share)


def test_signals_that_do_not_move_are_summed_as_they_are():
    """Where a sample's signal is the same everywhere, one visit an epoch tells all: kriging adds nothing."""
    rng = np.random.default_rng(2)
    matrix = np.repeat(rng.normal(size=(N, 1)), EPOCHS * positions(N, BATCH), axis=1) / N
    found, plain, _ = estimate(rng, matrix, panel_of(rng, matrix))
    expected = truth(matrix)
    kept = plain if found is None else found[0]
    assert np.mean((kept.centred - expected) ** 2) <= np.mean((plain.centred - expected) ** 2)
    assert np.corrcoef(kept.centred, expected)[0, 1] > 0.99


def test_pure_noise_is_not_taken_for_knowledge():
    """Signals that are new at every step (seed 3): if the panel is believed, the error says that little is known."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(N, EPOCHS * positions(N, BATCH))) / N
    found, _, _ = estimate(rng, matrix, panel_of(rng, matrix))
    if found is not None:
        totals, expected = found[0], truth(matrix)
        assert totals.centred_variance is not None
        z = (totals.centred - expected) / np.sqrt(totals.centred_variance)
        assert 0.6 < np.sqrt(np.mean(z**2)) < 1.6


def test_a_sample_that_no_batch_held_has_the_mean_and_its_error():
    """drop_last leaves samples out of epochs; one left out of all of them is an average sample as far as is known."""
    rng = np.random.default_rng(4)
    matrix = curves(rng)
    panel = panel_of(rng, matrix)
    sampler = ShuffledEpochs(N, BATCH)
    step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS)
    missing = int(np.setdiff1d(np.arange(N), panel.code)[0])
    kept = code != missing
    noise = shuffled_noise(panel, sampler, epochs=EPOCHS, positions="regular")
    found = kriged(
        step[kept],
        code[kept],
        value=value[kept],
        panel=panel,
        sampler=sampler,
        noise=noise,
        epochs=EPOCHS,
        positions="regular",
    )
    assert found is not None
    totals = found[0]
    assert totals.centred_variance is not None
    assert totals.visits[missing] == 0
    assert abs(totals.centred[missing]) < totals.centred.std() / 5
    assert totals.centred_variance[missing] > 3 * np.median(totals.centred_variance)


def test_panels_that_cannot_tell_are_refused():
    rng = np.random.default_rng(5)
    matrix = curves(rng)
    few = panel_of(rng, matrix, members=10)
    every = panel_of(rng, matrix, members=np.arange(N))
    changing = panel_arrays(
        matrix,
        BATCH,
        EPOCHS,
        samples=lambda _: np.sort(rng.choice(N, MEMBERS, replace=False)),
        grid=np.array([1, 4, 8]),
    )
    whole = panel_of(rng, matrix)
    early = whole.epoch < 3
    short = Panel(whole.epoch[early], whole.position[early], whole.code[early], whole.value[early])
    moving = Panel.from_flat(changing[0], changing[1], code=changing[2], value=changing[3])
    for panel in (few, every, moving, short):
        step, code, value = shuffle_run(rng, matrix, BATCH, EPOCHS)
        noise = shuffled_noise(panel, ShuffledEpochs(N, BATCH), positions="regular")
        found = kriged(
            step, code, value=value, panel=panel, sampler=ShuffledEpochs(N, BATCH), noise=noise, epochs=EPOCHS
        )
        assert found is None
