"""How much noisier is training without a subset? Standard deviations over retrainings of single-example losses.

    python -m benchmarks arms           # about a minute
    python -m benchmarks arms --runs 16

Without s of n samples, the same number of steps can be had in two ways: the rest spread over as many, smaller batches
(which `Sampler.boundaries` does: the epochs stay whole), or cut into full batches, so that training ends in mid-epoch.
The first has n/(n − s) times the variance of training with all samples, and the unit of μ counts with that; the second
is noisier, because shuffling noise is smallest at an epoch's end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

import finfluence as fi
from benchmarks._calibration_problems import Data, digits_data
from benchmarks._records import Record, parser
from finfluence.runs import Engine
from finfluence.workflows.digits import mlp

EPOCHS, BATCH, REMOVED = 20, 20, 50


def measured(data: Data, cut: str, *, seed: int) -> np.ndarray:
    """(40,) losses of the single-example queries after one training."""
    singles = [query for name, query in data.queries.items() if name != "validation"]
    x, y = (torch.cat([query[k] for query in singles]) for k in (0, 1))
    n = len(data.dataset)
    plan = fi.Plan(optimizer=fi.SGD(lr=0.05), epochs=EPOCHS, batch_size=BATCH, seed=seed)
    rest = np.random.default_rng(0).permutation(n)[REMOVED:] if cut != "all samples" else np.arange(n)
    model = mlp(0)
    engine = Engine(fi.ClassificationTask(), model, dataset=data.dataset, plan=plan, subset=np.sort(rest), population=n)
    batches = engine.batches()
    if cut == "full batches":
        drawn = plan.sampler.batches(len(rest), BATCH, seed=seed, steps=engine.total_steps)
        batches = (batch._replace(indices=np.sort(rest)[batch.indices]) for batch in drawn)
    for batch in batches:
        engine.step(batch)
    with torch.no_grad():
        return functional.cross_entropy(model(x), y, reduction="none").numpy()


def fixed_subset_sd(data: Data, cut: str, *, runs: int) -> np.ndarray:
    """(40,) standard deviations over runs, every run without the same samples."""
    return np.std([measured(data, cut, seed=1000 + run) for run in range(runs)], axis=0, ddof=1)


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--runs", type=int, default=96, help="retrainings of each kind")
    options = options_parser.parse_args(arguments)
    if options.quick:
        options.runs = 3
    data = digits_data()
    kinds = ("all samples", "smaller batches", "full batches")
    found = {cut: fixed_subset_sd(data, cut, runs=options.runs) for cut in kinds}
    n = len(data.dataset)
    rows = []
    for cut in ("smaller batches", "full batches"):
        low, mid, high = np.quantile(found[cut] / found["all samples"], [0.1, 0.5, 0.9])
        expected = np.sqrt(n / (n - REMOVED)) if cut == "smaller batches" else None
        rows.append({"cut": cut, "expected": expected, "median": mid, "low": low, "high": high})
    Record("arms", options, seeds=f"1000 to {999 + options.runs}").table(
        f"{n} digits, {REMOVED} removed, {EPOCHS * n // BATCH} steps, {options.runs} retrainings of each kind",
        {
            "cut": "batches of the arm without",
            "expected": "sd without / with, expected|.2f",
            "median": "median of 40 queries|.2f",
            "low": "10 %|.2f",
            "high": "90 %|.2f",
        },
        rows,
    )


if __name__ == "__main__":
    main()
