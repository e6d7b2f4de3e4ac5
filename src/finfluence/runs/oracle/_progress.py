"""What people see on stderr while an experiment runs."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PATIENCE = 2.0  # seconds before a bar is shown


class TrainingProgress:
    """One line before the start, and a bar for anything that takes longer than two seconds.

    Args:
        enabled: whether anything is shown.
        trainings: number of trainings to do.
        steps: optimizer steps of them all together.
        where: how they are run.
    """

    def __init__(self, *, enabled: bool, trainings: int, steps: int, where: str) -> None:
        self.enabled, self.trainings, self.steps = enabled and trainings > 0, trainings, steps
        self.console = Console(stderr=True, highlight=False)
        self.failed, self.finished, self.done = 0, 0, 0
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.bar: Progress | None = None
        if self.enabled:
            self.console.print(
                f"retraining: {trainings} trainings, {steps:,} optimizer steps in all; {where}", soft_wrap=True
            )

    def tick(self, steps: int) -> None:
        """Counts steps that were done."""
        with self.lock:
            self.done += steps
        self._show()

    def add(self, finished: int, failed: int) -> None:
        """Counts trainings that ended."""
        self.finished += finished
        self.failed += failed
        self._show()

    def _show(self) -> None:
        if not self.enabled or time.monotonic() - self.start < _PATIENCE:
            return
        with self.lock:
            if self.bar is None:
                self.bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.percentage:>3.0f} %"),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(elapsed_when_finished=False),
                    console=self.console,
                    transient=True,
                )
                rate = self.done / (time.monotonic() - self.start)
                if rate > 0:
                    self.console.print(
                        f"about {self.steps / rate:.0f} s in all, {rate:,.0f} steps a second", soft_wrap=True
                    )
                self.task = self.bar.add_task("", total=self.steps)
                self.bar.start()
            text = f"{self.finished} of {self.trainings} trainings"
            self.bar.update(
                self.task,
                completed=min(self.done, self.steps),
                description=text + (f", {self.failed} failed" if self.failed else ""),
            )

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
