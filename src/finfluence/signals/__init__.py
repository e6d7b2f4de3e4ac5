"""The signal store: one number for each sample, step and query, written as atomic Parquet parts and read with polars.

`SignalWriter` records a run directory, `SignalStore` reads one; `per_sample`, `step_means` and `arrays` turn the
signals of a query into statistics and NumPy arrays. Nothing here imports torch.
"""

from finfluence.signals._files import Folder, open_folder
from finfluence.signals._schema import STEPS_COLUMNS, IdDtype, SignalTable, Table
from finfluence.signals.statistics import SignalArrays, arrays, per_sample, step_means
from finfluence.signals.store import SignalStore
from finfluence.signals.writer import SignalWriter

__all__ = [
    "STEPS_COLUMNS",
    "Folder",
    "IdDtype",
    "SignalArrays",
    "SignalStore",
    "SignalTable",
    "SignalWriter",
    "Table",
    "arrays",
    "open_folder",
    "per_sample",
    "step_means",
]
