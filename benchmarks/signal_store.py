"""Time and memory of mean and variance per sample over a large store of signals.

    python -m benchmarks signal_store                     # 10^8 signals: 50,000 samples x 2,000 epochs, one query
    python -m benchmarks signal_store --epochs 200        # 10^7

A store is written into a scratch folder with `SignalWriter`, batch by batch as a shuffled training run would, and read
in a fresh process, so that its peak memory is the reader's alone. The scratch folder is deleted at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks._records import Record, parser
from finfluence.signals import SignalStore, SignalWriter, per_sample


def write(directory: Path, samples: int, epochs: int, batch: int) -> None:
    generator = np.random.default_rng(0)
    table = pl.DataFrame({"sample": np.arange(samples)})
    manifest = {"n_samples": samples, "batch_size": batch, "epochs": epochs, "seed": 0}
    step = 0
    with SignalWriter.create(directory, queries=["q"], id_dtype="int64", manifest=manifest, samples=table) as writer:
        for epoch in range(epochs):
            order = generator.permutation(samples)
            values = generator.standard_normal((samples, 1), dtype=np.float32) * 1e-4
            for position, start in enumerate(range(0, samples, batch)):
                ids = order[start : start + batch]
                writer.append_signals(step, ids, values[start : start + batch])
                writer.append_steps(
                    step=step,
                    epoch=epoch,
                    position=position,
                    learning_rate=0.1,
                    batch_size=ids.size,
                    loss=1.0,
                    residual=0.0,
                    scale=1.0,
                    nonfinite=False,
                    skipped=False,
                )
                step += 1


def read(directory: Path, engine: str) -> dict[str, float]:
    start = time.perf_counter()
    store = SignalStore.open(directory)
    if engine == "per_sample":
        frame = per_sample(store, "q")
    else:
        columns = pl.col("q").cast(pl.Float64)
        grouped = store.signals().group_by("sample").agg(columns.mean().alias("mean"), columns.var().alias("variance"))
        frame = grouped.collect(engine="streaming")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gb": peak_memory() / 1e9, "variance": float(frame["variance"].mean())}  # pyright: ignore[reportArgumentType]


def peak_memory() -> int:
    """Peak resident bytes of this process since it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(words: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--samples", type=int, default=50_000)
    made.add_argument("--epochs", type=int, default=2_000, help="visits of every sample")
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--scratch", type=Path, default=None, help="folder for the scratch store")
    made.add_argument("--read", type=Path, default=None, help="for the benchmark's own processes")
    made.add_argument("--engine", default="per_sample", help="for the benchmark's own processes")
    arguments = made.parse_args(words)
    if arguments.quick:
        arguments.samples, arguments.epochs = 1_000, 20
    if arguments.read is not None:
        print(json.dumps(read(arguments.read, arguments.engine)))
        return
    signals = arguments.samples * arguments.epochs
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        directory = Path(scratch) / "run"
        start = time.perf_counter()
        write(directory, arguments.samples, arguments.epochs, arguments.batch)
        seconds = time.perf_counter() - start
        size = sum(part.stat().st_size for part in directory.rglob("*.parquet"))
        rows = [{"what": "write", "seconds": seconds, "bytes": size / signals}]
        for engine, label in (
            ("per_sample", "per_sample (mean, variance, centred sum)"),
            ("polars", "polars group_by"),
        ):
            command = [sys.executable, "-m", "benchmarks.signal_store", "--read", str(directory), "--engine", engine]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append({"what": label, "seconds": result["seconds"], "peak": result["peak_gb"]})
    Record("signal_store", arguments, seeds=0).table(
        f"{signals:.3g} signals, {arguments.samples:,} samples × {arguments.epochs:,} visits, one query",
        {"what": "what", "seconds": "seconds|.2f", "peak": "peak memory, GB|.2f", "bytes": "bytes a signal|.2f"},
        rows,
    )


if __name__ == "__main__":
    main()
