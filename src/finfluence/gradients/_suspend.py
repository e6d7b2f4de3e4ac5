"""A switch that keeps recording hooks quiet while the library itself runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


def is_suspended() -> bool:
    """Whether the library itself is running a module now, so that nothing it does may be recorded."""
    return _depth > 0


@contextmanager
def suspended() -> Iterator[None]:
    """Run a block without its forward or backward passes being recorded."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
