"""`python -m benchmarks NAME [options]` runs one benchmark; without a name it lists them."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "arms": "how much noisier training without a subset is, and why its batches are cut as they are",
    "calibration": "one recorded run's μ against retraining, with its ceiling, slope and coverage",
    "oracle": "throughput of the retraining oracle, and the time of 22 subsets × 256 retrainings",
    "overhead": "step time and memory of recording over plain training",
    "replay_cost": "time and memory of a replay over the recorded training",
    "signal_store": "mean and variance per sample of 10^8 signals",
    "subset_queries": "10,000 random subsets of a run of 50,000 samples × 10 epochs",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        width = max(map(len, NAMES))
        print("usage: python -m benchmarks NAME [options]\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in NAMES.items()))
        sys.exit(0 if len(sys.argv) < 2 else 2)
    sys.argv[:] = [f"benchmarks {sys.argv[1]}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{sys.argv[0].split()[1]}").main()


if __name__ == "__main__":
    main()
