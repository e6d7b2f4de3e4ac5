"""Is μ calibrated? One recorded run's estimates against retraining with and without each of 22 subsets.

    python -m benchmarks calibration                             # every setting: hours on two cores
    python -m benchmarks calibration --settings tanh-sgd         # one setting: some minutes
    python -m benchmarks calibration --settings tanh-sgd --mean  # of the mean over the second half of the epochs
    python -m benchmarks calibration --quick                     # a smoke test

500 samples with 10 % wrong labels, 40 single-example queries, batch 20, 20 epochs, fixed initialisation. A rank
agreement is always printed beside its ceiling, which the truth's own noise sets. Rows of single runs are means over
recorded runs (seeds); "pooled" rows are `finfluence.pool` over them. "Disattenuated" is the slope with the estimates'
own error taken out of their variance: an estimate with noise has a slope below 1 even where it is unbiased.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import finfluence as fi
from benchmarks._calibration_problems import SETTINGS, Data, Setting, sample_table
from finfluence.influence import agreement, ceiling, detection

# μ, its standard error, and the part of that by which another run would differ, each (queries, subsets)
Estimate = tuple[np.ndarray, np.ndarray, np.ndarray]
# What a row shows: the recording that it reads, and how.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "live, batch": ("batch", {"sensitivity": "live"}),
    "replay, batch, plain sums": ("batch", {"shifts": "plain"}),
    "replay, batch": ("batch", {}),
    "replay, full": ("full", {}),
}


def truth_of(setting: Setting, data: Data, runs: int, directory: Path) -> fi.Truth:
    return fi.retrain(
        fi.ClassificationTask(),
        setting.make_model,
        data.dataset,
        data.queries,
        subsets=data.subsets,
        optimizer=setting.optimizer,
        epochs=setting.epochs,
        batch_size=20,
        runs=runs,
        initialisation="fixed",
        executor="ensemble",
        directory=directory,
        measure_epochs=setting.replay.measured(setting.epochs),
        **setting.options,
    )


def record(setting: Setting, data: Data, directory: Path, *, seed: int, signals: Any, live: bool = True) -> fi.Run:
    return fi.train(
        fi.ClassificationTask(),
        setting.make_model(0),
        data.dataset,
        queries=data.queries,
        optimizer=setting.optimizer,
        epochs=setting.epochs,
        batch_size=20,
        seed=seed,
        sensitivity="both" if live and signals == "batch" else "replay",
        signals=signals,
        panel=fi.NoisePanel(64, 5),
        replay_options=setting.replay,
        samples=sample_table(data),
        directory=directory,
        exist="resume",
        **setting.options,
    )


def single_queries(data: Data) -> list[str]:
    return [q for q in data.queries if q != "validation"]


def estimate(run: fi.Run, data: Data, how: dict[str, Any]) -> Estimate:
    frames = [run.influence(q, subsets=data.subsets, shared=True, **how) for q in single_queries(data)]
    mu, se, shared = (np.array([f[key].to_numpy() for f in frames]) for key in ("mu", "se", "se_shared"))
    return mu, se, np.sqrt(np.maximum(se**2 - shared**2, 0.0))


def pooled(runs: list[fi.Run], data: Data) -> Estimate:
    """Pooled μ, and the standard error whose normal interval is as wide as the pooled t-interval."""
    frames = [fi.pool(runs, q, subsets=data.subsets) for q in single_queries(data)]
    mu, low, high = (np.array([f[key].to_numpy() for f in frames]) for key in ("mu", "ci_low", "ci_high"))
    return mu, (high - low) / 2 / 1.959964, np.zeros_like(mu)


def flips_found(run: fi.Run, how: dict[str, Any]) -> float:
    mu = run.influence("validation", **how)["mu"].to_numpy()
    return detection(-mu, run.samples()["planted"].to_numpy()).auroc


def row(
    kind: str, estimates: list[Estimate], truth: tuple[np.ndarray, np.ndarray], top: Any, aurocs: list[float]
) -> dict[str, Any]:
    """One line of the table: means over estimates."""
    scores = [agreement(mu, truth[0], ceiling=top, estimated_se=se, truth_se=truth[1]) for mu, se, _ in estimates]
    # The width of a pooled t-interval is not the error of the estimate, so pooled rows are not disattenuated.
    reliable = [1 - float((own**2).mean() / mu.var()) if own.any() else 0.0 for mu, _, own in estimates]

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "signals": kind,
        "spearman": mean([a.spearman for a in scores]),
        "ceiling": top.correlation,
        "slope": mean([a.slope for a in scores]),
        "slope_low": mean([a.slope_interval[0] for a in scores]),
        "slope_high": mean([a.slope_interval[1] for a in scores]),
        "slope_disattenuated": mean([a.slope / r for a, r in zip(scores, reliable, strict=True) if r > 0.2]),
        "coverage": mean([a.coverage for a in scores]),
        "auroc": mean(aurocs),
        "runs": len(estimates),
    }


def evaluate(
    setting: Setting, *, runs: int, seeds: int, truth_directory: Path, recordings: Path, derivative_error: float = 1.0
) -> list[dict[str, Any]]:
    data = setting.data()
    reused = (truth_directory / setting.name).exists()
    began = time.perf_counter()
    truth = truth_of(setting, data, runs, truth_directory / setting.name)
    seconds = None if reused else time.perf_counter() - began
    names = single_queries(data)
    epoch = None if len(truth.epochs) == 1 else "mean"
    measured = truth.matrix(names, epoch=epoch)
    top = ceiling(*truth.split_halves(names, epoch=epoch))
    estimates: dict[str, list[Estimate]] = {kind: [] for kind in KINDS}
    aurocs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    kept: dict[str, list[fi.Run]] = {"batch": [], "full": []}
    for seed in range(1, seeds + 1):
        for signals, recorded in kept.items():
            run = record(setting, data, recordings / f"{signals}-{seed}", seed=seed, signals=signals)
            recorded.append(run)
            for kind, (own, how) in KINDS.items():
                if own == signals:
                    counted = {} if how.get("sensitivity") == "live" else {"derivative_error": derivative_error}
                    estimates[kind].append(estimate(run, data, how | counted))
                    aurocs[kind].append(flips_found(run, how))
    rows = [row(kind, found, measured, top, aurocs[kind]) for kind, found in estimates.items()]
    if seeds > 1:
        for signals, recorded in kept.items():
            rows.append(row(f"replay, {signals}, {seeds} runs pooled", [pooled(recorded, data)], measured, top, []))
    shared = {"setting": setting.name, "note": setting.note, "retrainings": runs, "truth_seconds": seconds}
    return [shared | r for r in rows]


HEAD = (
    "| setting | signals | Spearman | ceiling | slope, true on estimated | disattenuated | 95 % coverage "
    "| AUROC of flips |\n|---|---|---|---|---|---|---|---|"
)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [HEAD]
    for r in rows:
        auroc = "" if r["auroc"] is None else f"{r['auroc']:.3f}"
        straight = "" if r["slope_disattenuated"] is None else f"{r['slope_disattenuated']:.2f}"
        lines.append(
            f"| {r['note']} | {r['signals']} | {r['spearman']:.3f} | {r['ceiling']:.3f} | {r['slope']:.2f} "
            f"({r['slope_low']:.2f} to {r['slope_high']:.2f}) | {straight} | {r['coverage']:.0%} | {auroc} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=256, help="retrainings an arm")
    parser.add_argument("--seeds", type=int, default=3, help="recorded runs of each kind, also pooled")
    parser.add_argument(
        "--derivative-error", type=float, default=1.0, help="in single runs' intervals, see Run.influence"
    )
    parser.add_argument("--smoothing", type=float, default=None, help="of kinks, see ReplayOptions; 0 leaves them out")
    parser.add_argument("--truth", type=Path, default=None, help="keep (and reuse) the retrainings here")
    parser.add_argument("--recordings", type=Path, default=None, help="keep (and reuse) the recorded runs here")
    parser.add_argument("--mean", action="store_true", help="measure the mean over the second half of the epochs")
    parser.add_argument("--output", type=Path, default=None, help="add the figures to this JSON file")
    parser.add_argument("--quick", action="store_true", help="16 retrainings, one run, 3 epochs: a smoke test")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    scratch = Path(tempfile.mkdtemp())
    try:
        for name in options.settings:
            setting, runs, seeds = SETTINGS[name], options.runs, options.seeds
            if options.mean:
                setting = replace(
                    setting,
                    name=f"{name}-mean",
                    note=f"{setting.note}, mean over the second half",
                    replay=replace(setting.replay, measure_epochs="second-half"),
                )
            if options.smoothing is not None:
                setting = replace(setting, replay=replace(setting.replay, smoothing=options.smoothing))
            if options.quick:
                setting, runs, seeds = replace(setting, epochs=3), 16, 1
            found = evaluate(
                setting,
                runs=runs,
                seeds=seeds,
                truth_directory=(options.truth or scratch / "truth"),
                recordings=(options.recordings or scratch / "recordings") / setting.name,
                derivative_error=options.derivative_error,
            )
            print(f"{table(found)}\n", flush=True)
            rows = [r for r in rows if r["setting"] != setting.name] + found
            if options.output:
                options.output.write_text(
                    json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
