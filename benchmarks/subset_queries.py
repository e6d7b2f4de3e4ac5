"""How long 10,000 random subsets take on the totals of a run of 50,000 samples × 10 epochs.

python benchmarks/subset_queries.py
"""

import argparse
import time

import numpy as np

from finfluence.influence import InfluenceTable, SampleIndex, SampleTotals, q_values, successive_noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--subsets", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    n = options.samples
    code = np.concatenate([rng.permutation(n) for _ in range(options.epochs)])
    step = np.arange(len(code)) // options.batch
    value = rng.normal(size=len(code)).astype(np.float32)

    start = time.perf_counter()
    totals = SampleTotals.from_signals(step, code, value=value, n_samples=n)
    print(f"totals of {len(code):,} signals: {time.perf_counter() - start:.3f} s")
    start = time.perf_counter()
    noise = successive_noise(step, code, value=value, n_samples=n)
    print(f"noise by successive differences: {time.perf_counter() - start:.3f} s")

    q_values([0.5])  # loads scipy.stats, once a process
    members = [rng.choice(n, options.size, replace=False) for _ in range(options.subsets)]
    shuffled = rng.permutation(n)
    kinds = {
        "row numbers": (np.arange(n), lambda codes: codes),
        "sparse int64": (shuffled * 1_000_003, lambda codes: shuffled[codes] * 1_000_003),
    }
    for name, (ids, convert) in kinds.items():
        subsets = {f"subset {row}": convert(codes) for row, codes in enumerate(members)}
        times = []
        for _ in range(options.repeats):
            table = InfluenceTable(SampleIndex(ids), totals, noise)
            start = time.perf_counter()
            table.subsets(subsets)
            times.append(time.perf_counter() - start)
        print(
            f"{options.subsets:,} random subsets of {options.size} of {n:,} samples x {options.epochs} epochs, {name}: "
            f"median {np.median(times):.3f} s, slowest {max(times):.3f} s"
        )


if __name__ == "__main__":
    main()
