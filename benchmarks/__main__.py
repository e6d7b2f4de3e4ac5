"""`python -m benchmarks NAME [options]` runs one benchmark; without a name it lists them.

Each writes a record, benchmarks/results/NAME.json, unless `--quick` asks for a smoke test. `python -m benchmarks
results` makes benchmarks/RESULTS.md of the records.
"""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "consistency": "do other seeds give the same answer, and is it right; beside every peer",
    "mislabel": "finding wrong labels and other bad rows, beside every peer and two baselines",
    "agreement": "agreement with retraining, of finfluence and of every peer",
    "calibration": "one recorded run's μ against retraining, with its ceiling, slope and coverage",
    "arms": "how much noisier training without a subset is, and why its batches are cut as they are",
    "pairs": "what retrainings in pairs of one batch order are worth, beside independent ones",
    "left_out": "subsets left out along the recorded path, one training each, and first order, against retraining",
    "poison": "planted instructions that change one behaviour of a language model",
    "poison_truth": "μ of groups of a language model's rows, against fine-tuning again without them",
    "cuts": "what cleaning does, predicted and measured",
    "cost": "time and memory of every method for the same number of scores; how ours grow",
    "overhead": "step time and memory of recording over plain training",
    "smollm2_overhead": "recording the fine-tuning of a small language model",
    "llama8b_overhead": "recording the fine-tuning of Llama-3.1-8B on a GPU",
    "replay_cost": "time and memory of a replay over the recorded training",
    "oracle": "throughput of the retraining oracle, and the time of 22 subsets × 256 retrainings",
    "signal_store": "mean and variance per sample of 10^8 signals",
    "subset_queries": "10,000 random subsets of a run of 50,000 samples × 10 epochs",
}
# not measurements: what is made of the records
TOOLS = {"results": "RESULTS.md from the records", "figures": "docs/figures/*.svg from the records"}
_MODULES = {"results": "_results", "figures": "_figures"}


def main() -> None:
    known = NAMES | TOOLS
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        width = max(map(len, known))
        print("usage: python -m benchmarks NAME [--quick] [options]\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in known.items()))
        sys.exit(0 if len(sys.argv) < 2 else 2)
    name = sys.argv[1]
    sys.argv[:] = [f"benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{_MODULES.get(name, name)}").main()


if __name__ == "__main__":
    main()
