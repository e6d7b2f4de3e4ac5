"""run.json: what a run directory is, who writes it and whether that writer still lives."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from finfluence.errors import InputError, StoreError
from finfluence.signals._files import Folder, is_temporary

FILE = "run.json"
FORMAT = "finfluence-run"
FORMAT_VERSION = 1

# Fields that describe the store itself; a caller's manifest cannot set them.
OWNED = ("format", "format_version", "queries", "id_dtype", "status", "pid", "pid_started", "host")


def holds_run(folder: Folder) -> bool:
    """Tell whether the folder holds a run.

    Returns:
        False for a folder that is missing or empty but for what a write interrupted at creation left there.

    Raises:
        StoreError: the folder holds something else, which must not be written over.
    """
    if folder.is_file():
        raise StoreError(f"{folder.display} is a file, not a run directory; choose another directory")
    names = [name for name in folder.names() if not is_temporary(name)]
    if FILE in names:
        read_manifest(folder)
        return True
    if names:
        raise StoreError(
            f"{folder.display} exists and is not a run directory (it holds {names[0]!r} and no {FILE}); "
            "choose another directory"
        )
    return False


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Read run.json.

    Raises:
        StoreError: there is no run here, or run.json is not one that this version reads.
    """
    try:
        raw = folder.read(FILE)
    except (FileNotFoundError, NotADirectoryError):
        state = "is not a run directory" if folder.is_file() or folder.names() else "does not exist"
        raise StoreError(f"{folder.display} {state} (no {FILE}); pass the directory of a recorded run") from None
    except OSError as error:
        raise StoreError(f"cannot read {folder.path(FILE)}: {error}") from error
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise StoreError(f"{folder.path(FILE)} is not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{folder.path(FILE)} was not written by finfluence; pass the directory of a recorded run")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(f"{folder.path(FILE)} has format version {version!r}, this finfluence reads {FORMAT_VERSION}")
    missing = [field for field in ("queries", "id_dtype", "status") if field not in manifest]
    if missing:
        raise StoreError(f"{folder.path(FILE)} lacks {missing[0]!r}; restore it from a copy")
    return manifest


def write_manifest(folder: Folder, manifest: Mapping[str, Any]) -> None:
    """Rewrite run.json atomically.

    Raises:
        InputError: a field that JSON cannot hold.
        StoreError: the disk refuses it.
    """
    folder.write(FILE, encode(manifest))


def encode(manifest: Mapping[str, Any]) -> bytes:
    """Return run.json's bytes for a manifest, or raise InputError naming the field that JSON cannot hold."""
    for field, value in manifest.items():
        try:
            json.dumps(value, default=_plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"manifest field {field!r} = {value!r} cannot be written as JSON ({error})") from error
    return (json.dumps(dict(manifest), default=_plain, indent=2, ensure_ascii=False) + "\n").encode()


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise InputError when a caller's manifest sets a field that describes the store itself."""
    for field in fields:
        if field in OWNED:
            raise InputError(f"manifest field {field!r} is kept by the store; leave it out")


def ownership() -> dict[str, Any]:
    """Return the fields that name this process as the writer."""
    import psutil  # imported here because readers of finished runs need none of it

    return {
        "status": "running",
        "pid": os.getpid(),
        "pid_started": psutil.Process().create_time(),
        "host": socket.gethostname(),
    }


def check_abandoned(folder: Folder, manifest: Mapping[str, Any]) -> None:
    """Raise StoreError when another process still writes the run."""
    # This process's own abandoned writer (a notebook cell that failed) must not lock it out.
    foreign = manifest["status"] == "running" and manifest.get("pid") != os.getpid()
    if foreign and writer_state(manifest) == "alive":
        raise StoreError(
            f"{folder.display} is a run still being written by process {manifest['pid']}; "
            "wait until it ends, or stop it before resuming"
        )


def check_same(folder: Folder, manifest: Mapping[str, Any], **fields: Any) -> None:
    """Raise StoreError when a field of the run on disk is not what the caller is about to continue it with."""
    for field, given in fields.items():
        given, stored = json.loads(encode({field: given}))[field], manifest.get(field)
        if given != stored:
            raise StoreError(
                f"{folder.display} was started with {field} {stored!r}, not {given!r}; "
                "resume it with the same, or choose another directory"
            )


def writer_state(manifest: Mapping[str, Any]) -> Literal["alive", "dead", "unknown"]:
    """Tell whether the process that run.json names as its writer still runs.

    Returns:
        "unknown" when it ran on another host, where this process cannot look.
    """
    import psutil

    if manifest.get("host") != socket.gethostname():
        return "unknown"
    try:
        process = psutil.Process(int(manifest["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return "dead"
        # A process identifier is reused after a reboot or in a new container; the start time tells the two apart.
        started = manifest.get("pid_started")
        reused = started is not None and abs(process.create_time() - float(started)) > 2.0
    except psutil.AccessDenied:
        return "alive"
    except (psutil.Error, KeyError, TypeError, ValueError):
        return "dead"
    return "dead" if reused else "alive"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
