"""What a run, or several as one, can be asked to do; the results live above this floor, and load when asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from finfluence.runs.pooling import Recorded
    from finfluence.workflows.cleaning import Cleaning
    from finfluence.workflows.verification import Verification


class Facade:
    """The methods that `Run` and `PooledRuns` have in common; of several runs the first is the one trained again."""

    def clean(self, query: str, **options: Any) -> Cleaning:
        """Chooses rows to leave out and predicts what that does; `.write(path)` writes the data without them.

        Args:
            query: name of a recorded query.
            **options: effect ("harmful" or "supporting"), and one of fdr, top or budget; group, correction, data: see
                `finfluence.workflows.clean`.
        """
        from finfluence.workflows.cleaning import clean

        return clean(self._recorded, query, **options)

    def verify(self, ids: Any, **options: Any) -> Verification:
        """Retrains with and without some samples and puts measured μ beside predicted μ.

        Args:
            ids: sample ids, or what `clean` returned.
            **options: query, runs, precision, executor, recipe: see `finfluence.workflows.verify`.
        """
        from finfluence.workflows.verification import verify

        *_, last = verify(self._recorded, ids, **options)
        return last

    def verify_groups(self, column: str, **options: Any) -> list[Verification]:
        """Retrains with all samples and without each group of a column: measured μ beside predicted μ of every group.

        Args:
            column: of the sample table.
            **options: query, runs, precision, executor, recipe: see `finfluence.workflows.verify`.
        """
        from finfluence.workflows.verification import verify_groups

        return verify_groups(self._recorded, column, **options)

    def report(self, path: str | os.PathLike[str] | None = None, *, query: str | None = None) -> Path:
        """Writes a report, one HTML file that opens anywhere; of several runs what they say together, and each alone.

        Args:
            path: where to; by default report.html in the run's directory, or in the folder that holds the runs.
            query: the one to show; all of them by default.
        """
        from finfluence.workflows.report import write_report

        return write_report(self._recorded, path, query=query)

    @property
    def _recorded(self) -> Recorded:
        return cast("Recorded", self)
