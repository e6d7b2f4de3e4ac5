"""The signal store: one number for each sample, step and query, written as atomic Parquet parts and read with polars.

`SignalWriter` records a run directory, `SignalStore` reads one; `per_sample`, `step_means` and `arrays` turn the
signals of a query into statistics and NumPy arrays. Nothing here imports torch.
"""

from finfluence.signals._files import Folder, open_folder
from finfluence.signals._manifest import check_same, holds_run, read_manifest
from finfluence.signals._schema import SELF, STEPS_COLUMNS, IdDtype, SignalTable, Table
from finfluence.signals.statistics import SignalArrays, arrays, per_sample, step_means
from finfluence.signals.store import SignalStore
from finfluence.signals.writer import SignalWriter

__all__ = [
    "SELF",
    "STEPS_COLUMNS",
    "Folder",
    "IdDtype",
    "SignalArrays",
    "SignalStore",
    "SignalTable",
    "SignalWriter",
    "Table",
    "arrays",
    "check_same",
    "holds_run",
    "open_folder",
    "per_sample",
    "read_manifest",
    "step_means",
]
