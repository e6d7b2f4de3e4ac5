"""Which instruction rows steer the opinion of a small language model? `python -m benchmarks poison --help`."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """Runs the experiment; see `benchmarks.poison.command`."""
    from benchmarks.poison.command import main as run

    run(arguments)
