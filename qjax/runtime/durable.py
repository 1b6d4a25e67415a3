"""Durable files: a reader finds the old content, the new content or an error; never half of a file."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from qjax.errors import RunError
from qjax.runtime.lock import lock_descriptor

__all__ = ["explained", "open_atomic", "remove_leftovers"]

Path = str | os.PathLike[str]

_SUFFIX = ".qjax-tmp"
_serial = itertools.count()

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space, or choose a folder on another disk, and run again",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose a folder on another disk, and run again",
    errno.EFBIG: "the file is larger than this process may write (see `ulimit -f`); raise the limit and run again",
    errno.EIO: "the disk reported an input/output error; check it (`dmesg`), or choose a folder on another disk",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; choose a folder that you can write",
    errno.EPERM: "permission denied; choose a folder that you can write",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a part of the path is a file; choose another folder",
    errno.EISDIR: "it is a folder; choose another name",
}


def _free_bytes(folder: pathlib.Path) -> int | None:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@contextlib.contextmanager
def explained(path: pathlib.Path, size: int | None) -> Iterator[None]:
    """Turn an operating system error that a user can act on into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        needs = "" if size is None else f" {size} bytes"
        free = _free_bytes(path.parent)
        has = "" if free is None else f" ({free} bytes are free)"
        raise RunError(f"{path}: could not write{needs}{has}: {_REMEDIES[error.errno]}") from error


def _open_temporary(path: pathlib.Path) -> tuple[int, pathlib.Path]:
    """A new locked file beside `path`; the lock tells a file being written from what a killed process left."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}{_SUFFIX}")
        try:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except FileExistsError:  # a leftover of a dead process that had the same number
            continue
        # Another process may have taken the file for a leftover before it was locked.
        if lock_descriptor(descriptor) and temporary.exists():
            return descriptor, temporary
        os.close(descriptor)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_atomic(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A binary file to write that replaces `path`, durably, when the block ends without an error.

    Order: temporary file in the same folder, flush, fsync, rename, fsync of the folder. Missing folders are made.
    `size` in bytes is what the caller is about to write, for the message. Raises RunError for a full, failing,
    read-only or forbidden disk; `path` then keeps its old content.
    """
    path = pathlib.Path(path)
    with explained(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _open_temporary(path)
        file = os.fdopen(descriptor, "wb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            with contextlib.suppress(OSError):  # closing flushes again, and fails again on a full disk
                file.close()
            raise
        file.close()
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> list[pathlib.Path]:
    """Remove, below `folder`, the temporary files of processes that died while writing; returns what was removed."""
    removed = []
    for temporary in sorted(pathlib.Path(folder).rglob(f".*{_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError), temporary.open("rb") as file:
            if lock_descriptor(file.fileno()):
                temporary.unlink()
                removed.append(temporary)
    return removed
