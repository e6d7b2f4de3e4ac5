"""What scores cost: time and memory of every method for the same scores, as multiples of plain training; how ours grow.

    python -m benchmarks cost --peers PEERS

500 digits, a 64-32-10 MLP, 20 epochs of batch 20, scores of every sample on 40 single-example queries. Each method runs
in a process of its own, one thread. Time is processor time, which other work on the machine changes little, of all that
a user waits for once the data is there: the trainings that the method needs (finfluence: the recorded one; peers: one,
TRAK ten) and the scoring, without imports. Memory is the process's peak, with its libraries loaded; what the libraries
alone take is beside it. Growth is measured in one process by changing one thing at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import finfluence as fi
from benchmarks._data import Problem, clean_problem, digits, sources
from benchmarks._methods import plan, train
from benchmarks._peers import NOT_COMPARED, PEERS, missing, run_peer, write_problem
from benchmarks._records import Record, parser
from benchmarks.peers.common import network, peak_mb
from finfluence.runs import Engine

QUERIES = 40
KINDS = ("plain training", "finfluence, live", "finfluence, replay", "finfluence, replay, full signals")
BASE = {"samples": 500, "queries": 1, "width": 32, "epochs": 10}
GROWTH = {"samples": (250, 1000), "queries": (10, 40), "width": (128, 512), "epochs": (5, 20)}
LEFT_OUT = ("pydvl Data-Banzhaf (logistic)", "cleanlab")


def work(kind: str, problem: Problem, queries: int) -> None:
    """Does all of it: training, recording, replay and the scores."""
    model = network(problem.network)
    if kind == "plain training":
        engine = Engine(fi.ClassificationTask(), model, dataset=problem.dataset, plan=plan(problem, 1))
        for batch in engine.batches():
            engine.step(batch)
        return
    x, y = (torch.from_numpy(part) for part in problem.validation)
    asked = {f"q{k}": (x[k : k + 1], y[k : k + 1]) for k in range(queries)} if queries > 1 else {"q0": (x, y)}
    with tempfile.TemporaryDirectory() as folder:
        run = fi.train(
            fi.ClassificationTask(),
            model,
            problem.dataset,
            queries=asked,
            optimizer=problem.optimizer,
            epochs=problem.epochs,
            batch_size=problem.batch_size,
            seed=1,
            directory=Path(folder) / "run",
            sensitivity="live" if "live" in kind else "replay",
            signals="full" if "full" in kind else "batch",
            show_progress="never",
        )
        for name in asked:
            run.influence(name)


def seconds(kind: str, problem: Problem, queries: int) -> float:
    """Processor seconds: on a shared machine the clock on the wall measures the others."""
    began = time.process_time()
    work(kind, problem, queries)
    return time.process_time() - began


def measure(kind: str, queries: int, *, quick: bool) -> None:
    """In a fresh process: a small run first, so that imports are not counted, then the real one."""
    problem = clean_problem("digits", sources([], samples=0)["digits"], model="mlp", quick=quick)
    small = replace(problem, train=(problem.train[0][:40], problem.train[1][:40]), epochs=1)
    work(kind, small, 1)
    before = peak_mb()
    took = seconds(kind, problem, queries)
    print(json.dumps({"seconds": took, "peak_mb": peak_mb(), "before_mb": before}))


def in_a_process(kind: str, *, quick: bool) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.cost", "--measure", kind, *(["--quick"] if quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def grown(samples: int, width: int, epochs: int) -> Problem:
    x, y = digits()
    return Problem(
        name="growth",
        train=(x[:samples], y[:samples]),
        validation=(x[1000:1200], y[1000:1200]),
        planted=np.zeros(samples, dtype=bool),
        network=f"mlp-64-{width}-10-tanh",
        epochs=epochs,
    )


def growth_rows(*, quick: bool, repetitions: int) -> list[dict[str, Any]]:
    settings = [("base", BASE)]
    if not quick:
        settings += [(f"{key} {value}", BASE | {key: value}) for key, values in GROWTH.items() for value in values]
    rows = []
    for kind in KINDS:  # first uses import and allocate
        work(kind, grown(40, 8, 1), 1)
    for changed, setting in settings:
        problem = grown(setting["samples"], setting["width"], setting["epochs"] if not quick else 1)
        took = {
            kind: min(seconds(kind, problem, setting["queries"]) for _ in range(repetitions))
            for kind in (KINDS[:2] if quick else KINDS)
        }
        plain = took["plain training"]
        row: dict[str, Any] = {"changed": changed, "plain": plain, **setting}
        row["parameters"] = sum(p.numel() for p in network(problem.network).parameters())
        row |= {
            key: took[kind] / plain
            for key, kind in zip(("live", "replay", "full"), KINDS[1:], strict=True)
            if kind in took
        }
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--peers", type=Path, default=None, help="folder of the peers' environments")
    options_parser.add_argument("--repetitions", type=int, default=2, help="the fastest counts")
    options_parser.add_argument("--measure", default=None, help="for the benchmark's own processes")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    queries = 2 if options.quick else QUERIES
    if options.measure:
        measure(options.measure, queries, quick=options.quick)
        return
    record = Record("cost", options, seeds=1)
    rows = []
    for kind in KINDS[:1] if options.quick else KINDS:
        found = [in_a_process(kind, quick=options.quick) for _ in range(1 if options.quick else options.repetitions)]
        rows.append({"method": kind, **min(found, key=lambda f: f["seconds"])})
    plain = rows[0]["seconds"]
    notes: dict[str, str] = {}
    if options.peers:
        problem = clean_problem("digits", sources([], samples=0)["digits"], model="mlp")
        x, y = problem.validation
        training = train(problem, seed=1, start=0)
        ensemble = [train(problem, seed=s, start=s, most=1).checkpoints[-1] for s in range(10, 20)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "problem.npz"
            write_problem(path, training, (x[:QUERIES], y[:QUERIES]), ensemble=ensemble)
            for peer in PEERS:
                if peer.name in LEFT_OUT:
                    continue
                result = run_peer(peer, path, folder=options.peers)
                if isinstance(result, str):
                    notes[peer.name] = result
                    continue
                trainings = 10 if peer.needs == "ensemble" else 1
                about = result.about
                rows.append({"method": peer.name, **about, "seconds": about["seconds"] + trainings * plain})
    for row in rows:
        row["ratio"] = row["seconds"] / plain
        row["growth_mb"] = row["peak_mb"] - row["before_mb"]
    n = 200 if options.quick else 500
    record.table(
        f"{n} samples × {queries} queries",
        {
            "method": "method",
            "seconds": "training and scoring, processor s|.2f",
            "ratio": "over plain training|.1f",
            "peak_mb": "peak memory, MB|.0f",
            "before_mb": "before, with libraries, MB|.0f",
            "growth_mb": "growth, MB|.0f",
            "settings": "settings",
        },
        sorted(rows, key=lambda r: r["seconds"]),
    )
    base = ", ".join(f"{value} {key}" for key, value in BASE.items())
    record.table(
        f"Growth, over plain training of the same setting; base: {base}",
        {
            "changed": "changed",
            "parameters": "parameters|,d",
            "plain": "plain training, processor s|.2f",
            "live": "live|.1f",
            "replay": "replay|.1f",
            "full": "replay, full signals|.1f",
        },
        growth_rows(quick=options.quick, repetitions=1 if options.quick else options.repetitions),
    )
    for peer, reason in (notes | NOT_COMPARED).items():
        record.note(f"{peer}: {reason}.")
    if options.peers and (absent := missing(options.peers)):
        record.note(f"Without an environment and so left out: {', '.join(absent)}.")


if __name__ == "__main__":
    main()
