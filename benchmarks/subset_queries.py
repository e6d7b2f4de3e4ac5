"""How long 10,000 random subsets take on the totals of a run of 50,000 samples × 10 epochs.

python -m benchmarks subset_queries
"""

import time

import numpy as np

from benchmarks._records import Record, parser
from finfluence.influence import InfluenceTable, SampleIndex, SampleTotals, q_values, successive_noise


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--samples", type=int, default=50_000)
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--batch", type=int, default=100)
    made.add_argument("--subsets", type=int, default=10_000)
    made.add_argument("--size", type=int, default=500)
    made.add_argument("--repeats", type=int, default=3)
    options = made.parse_args(arguments)
    if options.quick:
        options.samples, options.epochs, options.subsets, options.size = 2_000, 3, 50, 20
    rng = np.random.default_rng(0)
    n = options.samples
    code = np.concatenate([rng.permutation(n) for _ in range(options.epochs)])
    step = np.arange(len(code)) // options.batch
    value = rng.normal(size=len(code)).astype(np.float32)

    start = time.perf_counter()
    totals = SampleTotals.from_signals(step, code, value=value, n_samples=n)
    rows = [{"what": f"totals of {len(code):,} signals", "median": time.perf_counter() - start}]
    start = time.perf_counter()
    noise = successive_noise(step, code, value=value, n_samples=n)
    rows.append({"what": "noise by successive differences", "median": time.perf_counter() - start})

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
        what = (
            f"{options.subsets:,} random subsets of {options.size} of {n:,} samples × {options.epochs} epochs, {name}"
        )
        rows.append({"what": what, "median": float(np.median(times)), "slowest": max(times)})
    Record("subset_queries", options, seeds=0).table(
        "Seconds", {"what": "what", "median": "median, s|.3f", "slowest": "slowest, s|.3f"}, rows
    )


if __name__ == "__main__":
    main()
