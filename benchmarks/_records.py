"""Records of benchmarks: what was run, on what, and the tables it found; RESULTS.md is made of them alone."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("finfluence", "torch", "numpy", "scipy", "polars", "scikit-learn")
# Options whose values are places on one machine or do not change what is measured; a record names them, not the place.
_PLACES = {"data": "DATA", "peers": "PEERS", "output": None, "truth": None, "scratch": None}
Row = Mapping[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a smoke test of seconds; its figures mean nothing")
    made.add_argument("--output", type=Path, default=None, help="JSON record; benchmarks/results/NAME.json by default")
    return made


def machine() -> dict[str, Any]:
    """The machine and the threads, without anything that names it."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            import importlib

            found[name] = str(getattr(importlib.import_module(name.replace("-", "_")), "__version__", "unknown"))
    return found


class Record:
    """One benchmark's record under way: prints each table as it comes and writes them all as JSON.

    A quick run writes only where it is told to: its figures mean nothing.

    Args:
        name: the benchmark.
        options: its parsed options, of `parser`.
        seeds: what was random, in words or numbers.
        merge: keep what an earlier record has and this run does not make again.
    """

    def __init__(self, name: str, options: argparse.Namespace, *, seeds: Any = None, merge: bool = False) -> None:
        self.name, self.options = name, options
        self.path: Path | None = options.output or (None if options.quick else RESULTS / f"{name}.json")
        self._began = time.perf_counter()
        self.content: dict[str, Any] = {
            "name": name,
            "quick": bool(options.quick),
            "command": command(name, options),
            "date": datetime.now(UTC).date().isoformat(),
            "seeds": seeds,
            "versions": versions(),
            "machine": machine(),
            "tables": [],
            "notes": [],
        }
        self._before = 0.0
        if merge and self.path and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            kept = {key: earlier.get(key, []) for key in ("tables", "notes")}
            kept["versions"] = earlier.get("versions", {}) | self.content["versions"]
            self.content = earlier | self.content | kept
            self._before = earlier.get("seconds", 0.0)

    def table(self, title: str, columns: Mapping[str, str], rows: Sequence[Row], *, part: str | None = None) -> None:
        """Adds a table and prints it as Markdown.

        Args:
            title: above the table; a table of the same title is replaced.
            columns: heading by key, in order. A heading may end in a format of its numbers: "ratio|.2f".
            rows: one mapping a row; what no column shows is kept in the record all the same.
            part: key by which an earlier table of the title keeps its rows, where it has values that no new row has.
        """
        made = {"title": title, "columns": dict(columns), "rows": [_plain(row) for row in rows]}
        made["command"] = self.content["command"]
        tables = self.content["tables"]
        places = [place for place, known in enumerate(tables) if known["title"] == title]
        if places:
            if part is not None:
                new = {row[part] for row in made["rows"]}
                earlier = tables[places[0]]
                if kept := [row for row in earlier["rows"] if row[part] not in new]:
                    made["rows"] = kept + made["rows"]
                    before, now = earlier.get("command", ""), made["command"]
                    made["command"] = before if before.endswith(now) else f"{before}; then {now}"
            tables[places[0]] = made
        else:
            tables.append(made)
        print(f"{markdown(made)}\n", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Adds a sentence under the tables."""
        if text not in self.content["notes"]:
            self.content["notes"].append(text)
        print(f"{text}\n", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the record; called after each table, so that a killed run keeps what it found."""
        self.content["seconds"] = round(self._before + time.perf_counter() - self._began, 1)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def command(name: str, options: argparse.Namespace) -> str:
    """The command as anyone can type it: places are named, not given."""
    words = [f"python -m benchmarks {name}"]
    given = sys.argv[1:] if sys.argv and Path(sys.argv[0]).name.startswith(("benchmarks", "__main__")) else None
    for key, value in vars(options).items():
        flag = f"--{key.replace('_', '-')}"
        if value is None or value is False or key in _PLACES or (given is not None and flag not in given):
            continue
        if value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [flag, *(shlex.quote(str(value)) for value in values)]
    for key, place in _PLACES.items():
        if place and getattr(options, key, None):
            words += [f"--{key}", place]
    return " ".join(words)


def markdown(table: Mapping[str, Any]) -> str:
    """A table as Markdown."""
    formats: dict[str, str | None] = {}
    heads: list[str] = []
    for key, heading in table["columns"].items():
        title, _, style = heading.partition("|")
        heads.append(title)
        formats[key] = style or None
    lines = [f"**{table['title']}**", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table["rows"]:
        lines.append("| " + " | ".join(_cell(row.get(key), style) for key, style in formats.items()) + " |")
    return "\n".join(lines)


def _cell(value: Any, style: str | None) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):  # value, low, high
        middle, low, high = (_cell(part, style) for part in value)
        return middle if "–" in (low, high) else f"{middle} ({low} to {high})"
    if isinstance(value, int | float) and style:
        return format(value, style)
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _plain(row: Row) -> dict[str, Any]:
    """JSON values of a row: NumPy scalars become Python's, not-a-number becomes null, floats keep six digits."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, float):
            return None if value != value else float(f"{value:.6g}")
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value

    return {key: plain(value) for key, value in row.items()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [row.partition(":")[2].strip() for row in info.read_text().splitlines() if row.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
