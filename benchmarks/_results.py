"""RESULTS.md, made of the records in benchmarks/results and of nothing else.

python -m benchmarks results            # writes benchmarks/RESULTS.md
python -m benchmarks results --check    # exits with 1 where it differs from what the records make
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.__main__ import NAMES
from benchmarks._records import RESULTS, markdown

PAGE = RESULTS.parent / "RESULTS.md"
_HEAD = """# Results

Made by `python -m benchmarks results` of the records in `benchmarks/results/`; do not edit. `README.md` beside this
page says what the figures mean and which aims were missed.
"""


def page(folder: Path = RESULTS) -> str:
    """The whole page."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    order = list(NAMES)

    def place(stem: str) -> tuple[int, str]:
        # "poison-small" is a record of the benchmark "poison"
        family = next((name for name in sorted(order, key=len, reverse=True) if stem.startswith(name)), None)
        return (order.index(family) if family else len(order), stem)

    return "\n".join([_HEAD, *(section(stem, records[stem]) for stem in sorted(records, key=place))])


def section(stem: str, record: dict[str, Any]) -> str:
    """One record: what it is, how it was made, its tables and notes."""
    about = NAMES.get(stem)
    lines = [f"## {stem}" + (f": {about}" if about else ""), "", provenance(record, stem), ""]
    for table in record.get("tables") or tables_of(record):
        lines += [markdown(table), ""]
    lines += [f"- {' '.join(note.split())}" for note in record.get("notes") or [] if isinstance(note, str)]
    return "\n".join(lines).rstrip() + "\n"


def provenance(record: dict[str, Any], stem: str) -> str:
    """Command, machine, versions, seeds and time, as far as the record has them."""
    commands = [table["command"] for table in record.get("tables") or [] if "command" in table]
    commands = commands or [record.get("command") or f"python -m benchmarks {stem}"]
    parts = [", ".join(f"`{command}`" for command in dict.fromkeys(commands))]
    machine = record.get("machine")
    if isinstance(machine, dict):
        shown = [machine.get("gpu") or machine.get("processor"), machine.get("system")]
        if not machine.get("gpu") and machine.get("cores"):
            shown.append(f"{machine['cores']} cores, {machine.get('threads')} thread(s) used")
        parts.append(", ".join(str(part) for part in shown if part))
    elif machine:
        parts.append(str(machine))
    versions = record.get("versions")
    if isinstance(versions, dict):
        parts.append(
            ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "finfluence") if name in versions)
        )
    if record.get("seeds") is not None:
        parts.append(f"seeds: {record['seeds']}")
    if record.get("date"):
        parts.append(str(record["date"]))
    if record.get("seconds"):
        parts.append(f"{record['seconds']:,.0f} s")
    return "; ".join(parts)


def tables_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables of a record that holds rows alone: every column that has plain values, floats with three digits."""
    rows = [row for row in record.get("rows") or [] if isinstance(row, dict)]
    columns: dict[str, str] = {}
    for row in rows:
        for key, value in row.items():
            if value is None or isinstance(value, str | int | float):
                columns.setdefault(key, key.replace("_", " "))
    return [{"title": "Figures", "columns": columns, "rows": rows}] if columns else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    made = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            sys.exit("benchmarks/RESULTS.md differs from its records; run python -m benchmarks results")
        return
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE.name}: {made.count('## ')} records, {len(made.splitlines())} lines")


if __name__ == "__main__":
    main()
