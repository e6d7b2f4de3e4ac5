"""Known signal matrices and samplers, simulated directly, for the tests of this floor."""

import numpy as np


def signal_matrix(rng, n, steps, *, rows=1.0, drift=1.0, wobble=0.5, rough=0.7):
    """(n, steps) signals: a level a sample, a common drift, a drift of each sample's own, and rough noise."""
    time = np.linspace(-1, 1, steps)
    return (
        rows * rng.normal(size=(n, 1))
        + drift * np.sin(3 * time)[None, :]
        + wobble * rng.normal(size=(n, 1)) * time
        + rough * rng.normal(size=(n, steps)) * (0.5 + rng.random((n, 1)))
    ) / n


def shuffle_run(rng, matrix, batch, epochs, *, drop_last=False):
    """One shuffled run over a matrix (n, steps) as flat (step, code, value); a short last batch has larger weights."""
    n = len(matrix)
    steps, codes, values = [], [], []
    step = 0
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, batch):
            members = order[start : start + batch]
            if len(members) < batch and drop_last:
                continue
            steps.append(np.full(len(members), step))
            codes.append(members)
            values.append(matrix[members, step] * (batch / len(members)))
            step += 1
    return np.concatenate(steps), np.concatenate(codes), np.concatenate(values)


def positions(n, batch, *, drop_last=False):
    return n // batch if drop_last else -(-n // batch)


def panel_arrays(matrix, batch, epochs, *, samples, grid, drop_last=False):
    """Flat panel of these samples (array, or a function of the epoch) at these positions of every epoch."""
    n = len(matrix)
    per_epoch = positions(n, batch, drop_last=drop_last)
    size = np.full(per_epoch, batch)
    if not drop_last and n % batch:
        size[-1] = n % batch
    columns = [], [], [], []
    for epoch in range(epochs):
        chosen = samples(epoch) if callable(samples) else samples
        places = grid(epoch) if callable(grid) else grid
        for place in places:
            columns[0].append(np.full(len(chosen), epoch))
            columns[1].append(np.full(len(chosen), place))
            columns[2].append(chosen)
            columns[3].append(matrix[chosen, epoch * per_epoch + place] * batch / size[place])
    return [np.concatenate(column) for column in columns]


def agrees(simulated, expected, sims, *, sds=5.0, slack=0.0):
    """Whether simulated variances equal the expected within `sds` standard errors of a Gaussian variance estimate."""
    return np.all(np.abs(simulated / expected - 1) < sds * np.sqrt(2 / sims) + slack)
