"""Folders of plain files, local or on an fsspec file system, whose files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from finfluence.errors import StoreError

# Backends whose put replaces an object in one operation: a temporary name and a rename, which they carry out as a
# copy and a delete, would only add a window in which neither name is complete.
ATOMIC_PUT_PROTOCOLS = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2"})

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def temporary_name(name: str) -> str:
    """Return the name under which a file is written before it is renamed to `name`."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/.{base}.tmp" if folder else f".{base}.tmp"


def is_temporary(base: str) -> bool:
    """Tell whether a file's base name is one that an interrupted write may have left behind."""
    return base.startswith(".") and base.endswith(".tmp")


class Folder(ABC):
    """A folder addressed by names relative to it, with `/` between the levels."""

    display: str

    @abstractmethod
    def names(self, sub: str = "") -> list[str]:
        """List the base names in the folder, or in `sub` of it, sorted; empty when it does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's bytes; FileNotFoundError when it is missing."""

    @abstractmethod
    def source(self, name: str) -> Any:
        """Return what pyarrow opens to read the file: a path, or an open seekable file."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; silent when it is missing."""

    @abstractmethod
    def _write(self, name: str, data: memoryview) -> None:
        """Write a file whole or not at all, replacing one of the same name; OSError when it cannot."""

    @abstractmethod
    def is_file(self) -> bool:
        """Tell whether a plain file stands where the folder should be."""

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Write a file whole or not at all, replacing one of the same name.

        Args:
            name: relative name; missing folders on the way are made.
            data: the file's bytes.

        Raises:
            StoreError: the disk is full or refuses the file; the file of this name, if any, is as it was before.
        """
        try:
            self._write(name, memoryview(data))
        except OSError as error:
            raise StoreError(self._refusal(name, len(data), error)) from error

    def clean(self, sub: str = "") -> None:
        """Delete what interrupted writes have left in the folder, or in `sub` of it."""
        for base in self.names(sub):
            if is_temporary(base):
                self.remove(f"{sub}/{base}" if sub else base)

    def path(self, name: str) -> str:
        """Return a file's full name as messages show it."""
        return f"{self.display.rstrip('/')}/{name}"

    def _refusal(self, name: str, size: int, error: OSError) -> str:
        reason = error.strerror or str(error) or type(error).__name__
        remedy = "free space" if error.errno in _NO_SPACE else "make the directory writable"
        return (
            f"cannot write {self.path(name)} ({size / 1e6:.3g} MB): {reason}; "
            f"what was recorded before is intact, {remedy} and resume the run"
        )


class LocalFolder(Folder):
    """A folder on a local or mounted disk: temporary name, fsync, rename, fsync of the folder."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.display = str(path)

    def names(self, sub: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.root / sub))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def source(self, name: str) -> str:
        return str(self.root / name)

    def remove(self, name: str) -> None:
        path = self.root / name
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                _sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error.strerror}; make the directory writable") from error

    def is_file(self) -> bool:
        return self.root.is_file()

    def _write(self, name: str, data: memoryview) -> None:
        final = self.root / name
        temporary = self.root / temporary_name(name)
        _make_folder(final.parent)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(final.parent)


class RemoteFolder(Folder):
    """A folder on an fsspec file system; writes are as atomic as the backend's put, or else its move, is."""

    def __init__(self, url: str) -> None:
        # Imported here because a local run needs none of it.
        from fsspec.core import url_to_fs

        self.display = url
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot open {url}: {error}; install the fsspec backend of this protocol") from error
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._puts_atomically = bool(protocols & ATOMIC_PUT_PROTOCOLS)

    def names(self, sub: str = "") -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._full(sub), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self._full(name)))

    def source(self, name: str) -> Any:
        return self._fs.open(self._full(name), "rb")

    def remove(self, name: str) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._full(name))
        except OSError as error:
            raise StoreError(f"cannot delete {self.path(name)}: {error}; make the directory writable") from error

    def is_file(self) -> bool:
        return bool(self._fs.isfile(self._root))

    def _write(self, name: str, data: memoryview) -> None:
        final = self._full(name)
        if self._puts_atomically:
            self._fs.pipe_file(final, bytes(data))
            return
        temporary = self._full(temporary_name(name))
        self._fs.makedirs(final.rpartition("/")[0], exist_ok=True)
        try:
            self._fs.pipe_file(temporary, bytes(data))
            self._fs.mv(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.rm_file(temporary)
            raise

    def _full(self, name: str) -> str:
        root = self._root.rstrip("/")
        return f"{root}/{name}" if name else root


def open_folder(directory: str | os.PathLike[str]) -> Folder:
    """Return the folder at a local path or an fsspec URL, without touching it.

    Args:
        directory: a path, or a URL such as `s3://bucket/runs/a`; `file://` URLs are local paths.
    """
    text = os.fspath(directory)
    for prefix in ("file://", "local://"):
        if text.startswith(prefix):
            return LocalFolder(Path(text.removeprefix(prefix)))
    if "://" in text or "::" in text:
        return RemoteFolder(text)
    return LocalFolder(Path(text).expanduser())


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    # A rename survives a power cut only once its folder is synced; elsewhere than on POSIX folders cannot be opened.
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
