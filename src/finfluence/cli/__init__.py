"""The command line: each command is a thin call of the floor below."""

from finfluence.cli.main import main

__all__ = ["main"]
