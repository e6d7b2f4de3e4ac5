"""A progress bar on standard error for anything that takes longer than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

ShowProgress = Literal["auto", "never"]
_PATIENCE = 2.0


@contextlib.contextmanager
def progress(title: str, *, total: int, done: int = 0, show: ShowProgress = "auto") -> Iterator[Callable[[], None]]:
    """Yields a function to call after each of `total` pieces of work.

    Args:
        title: what is being done, a participle.
        total: pieces of work.
        done: pieces that were finished before.
        show: "auto" draws a bar on a terminal once two seconds have passed; "never" draws nothing.
    """
    if show == "never" or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=total, completed=done)
    began, shown = time.monotonic(), False

    def advance() -> None:
        nonlocal shown
        bar.advance(task)
        if not shown and time.monotonic() - began > _PATIENCE:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
