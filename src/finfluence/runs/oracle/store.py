"""An experiment on disk: a manifest and Parquet parts, one row for each training and measured epoch.

    truth.json                what was trained; must match when the experiment is taken up again
    trainings/part-*.parquet  arm, run, seed, epoch, status, error, seconds, one float64 column a query

A part appears whole or not at all, so whatever was stored when a process was killed counts.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle.problem import Outcome
from finfluence.signals._files import Folder, is_temporary, open_folder

FILE = "truth.json"
FORMAT = "finfluence-truth"
FORMAT_VERSION = 1
_PARTS = "trainings"
_KEYS = {
    "arm": pl.String,
    "run": pl.Int64,
    "seed": pl.Int64,
    "epoch": pl.Float64,
    "status": pl.String,
    "error": pl.String,
    "seconds": pl.Float64,
}
_MOST_PARTS = 32


def check_queries(names: Iterable[str]) -> None:
    """Refuses query names that are columns of the store.

    Raises:
        InputError: a name is taken, or not a string.
    """
    for name in names:
        if not isinstance(name, str) or not name or name in _KEYS:
            raise InputError(f"a query cannot be named {name!r}; give a string other than {', '.join(_KEYS)}")


class TruthStore:
    """The directory of one experiment.

    Args:
        directory: a path or an fsspec URL.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.folder: Folder = open_folder(directory)

    def manifest(self) -> dict[str, Any] | None:
        """What truth.json holds; None where there is no experiment yet.

        Raises:
            OracleError: the directory holds something else, or a format that this version does not read.
        """
        if self.folder.is_file():
            raise OracleError(f"{self.folder.display} is a file; give a directory")
        names = [name for name in self.folder.names() if not is_temporary(name)]
        if FILE not in names:
            if names:
                raise OracleError(
                    f"{self.folder.display} holds {names[0]!r} but no {FILE}; give an empty or new directory"
                )
            return None
        try:
            manifest = json.loads(self.folder.read(FILE))
        except ValueError as error:
            raise OracleError(
                f"{self.folder.path(FILE)} is not valid JSON ({error}); restore it from a copy"
            ) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise OracleError(f"{self.folder.path(FILE)} was not written by finfluence; give another directory")
        if (version := manifest.get("format_version")) != FORMAT_VERSION:
            raise OracleError(
                f"{self.folder.path(FILE)} has format version {version!r}, this finfluence reads {FORMAT_VERSION}"
            )
        # experiments of before this was a choice had independent orders
        manifest["experiment"] = {"orders": "independent"} | manifest["experiment"]
        return manifest

    def begin(self, experiment: Mapping[str, Any], subsets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Writes the manifest, or checks it and adds new subsets to it.

        Args:
            experiment: everything that must be the same when trainings are added, nested plain values.
            subsets: by name, {"arm", "ids"}.

        Returns:
            The manifest as it is on disk now.

        Raises:
            OracleError: the directory's experiment differs; the message names the field and both values.
        """
        experiment = json.loads(json.dumps(experiment))
        found = self.manifest()
        known = {} if found is None else dict(found["subsets"])
        if found is not None:
            for field, stored, wanted in _differences(found["experiment"], experiment):
                raise OracleError(
                    f"{self.folder.display} was made with {field} = {stored!r}, now it is {wanted!r}; "
                    "use another directory or the same settings"
                )
        for name, entry in subsets.items():
            if name in known and known[name]["arm"] != entry["arm"]:
                raise OracleError(
                    f"{self.folder.display} has a subset {name!r} of {len(known[name]['ids'])} other samples; "
                    "choose another name or directory"
                )
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "experiment": experiment,
            "subsets": known | {name: dict(entry) for name, entry in subsets.items()},
        }
        if manifest != found:
            self.folder.write(FILE, json.dumps(manifest, indent=1).encode())
        self.folder.clean(_PARTS)
        return manifest

    def append(self, outcomes: Sequence[Outcome], *, queries: Sequence[str], epochs: Sequence[float]) -> None:
        """Writes outcomes as one part.

        Args:
            outcomes: of trainings.
            queries: names of the measurements' columns.
            epochs: of the measurements' rows.
        """
        rows = [(outcome, k) for outcome in outcomes for k in range(1 if outcome.values is None else len(epochs))]
        values = np.array(
            [np.full(len(queries), np.nan) if outcome.values is None else outcome.values[k] for outcome, k in rows]
        ).reshape(len(rows), len(queries))
        keys = [
            (
                *outcome.job,
                epochs[-1] if outcome.values is None else epochs[k],
                "finished" if outcome.error is None else "failed",
                outcome.error,
                outcome.seconds,
            )
            for outcome, k in rows
        ]
        frame = pl.DataFrame(keys, schema=_KEYS, orient="row")
        frame = frame.with_columns(
            pl.Series(name, values[:, j], dtype=pl.Float64).fill_nan(None) for j, name in enumerate(queries)
        )
        self._write(frame)

    def trainings(self, queries: Sequence[str]) -> pl.DataFrame:
        """Every training's rows, each (arm, run, epoch) once; a finished attempt replaces failed ones.

        Raises:
            OracleError: a part cannot be read.
        """
        frames = [pl.DataFrame(schema=_KEYS | dict.fromkeys(queries, pl.Float64))]
        for name in self._parts():
            try:
                frame = pl.from_arrow(pq.read_table(self.folder.source(name)))
            except Exception as error:
                raise OracleError(f"cannot read {self.folder.path(name)}: {error}; restore or delete it") from error
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame.select([*_KEYS, *queries]).cast(frames[0].schema))
        # "finished" after "failed" in the alphabet, so the last of a training is its best
        return (
            pl.concat(frames)
            .sort("arm", "run", "epoch", "status")
            .unique(["arm", "run", "epoch"], keep="last", maintain_order=True)
        )

    def compact(self, queries: Sequence[str]) -> None:
        """Merges many small parts into one."""
        parts = self._parts()
        if len(parts) > _MOST_PARTS:
            # a reader between the two sees rows twice, and counts them once
            self._write(self.trainings(queries))
            for name in parts:
                self.folder.remove(name)

    def _parts(self) -> list[str]:
        return [f"{_PARTS}/{name}" for name in self.folder.names(_PARTS) if name.endswith(".parquet")]

    def _write(self, frame: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        pq.write_table(frame.to_arrow(), buffer, compression="zstd")
        self.folder.write(f"{_PARTS}/part-{uuid.uuid4().hex[:12]}.parquet", buffer.getbuffer())


def _differences(stored: Any, wanted: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Paths at which two nested values differ, with both values."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in [*stored, *(k for k in wanted if k not in stored)]:
            yield from _differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif stored != wanted:
        yield path, stored, wanted
