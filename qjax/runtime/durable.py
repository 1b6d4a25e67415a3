"""Durable files and folders: a reader finds the old content, the new content or an error; never a half of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from qjax.errors import RunError
from qjax.runtime.lock import lock_descriptor

__all__ = ["WholeFolder", "explained", "link_or_copy", "open_atomic", "remove_leftovers", "replacing", "sync"]

Path = str | os.PathLike[str]

_SUFFIX = ".qjax-tmp"
_serial = itertools.count()
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

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


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that replaces `path`, durably, when the block ends without an error.

    Order: temporary file in the same folder, flush, fsync, rename, fsync of the folder. Missing folders are made.
    Raises OSError when it cannot be written; `path` then keeps its old content.
    """
    path = pathlib.Path(path)
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
    sync(path.parent)


@contextlib.contextmanager
def open_atomic(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """`replacing`, with an error that says what to do.

    `size` in bytes is what the caller is about to write, for the message. Raises RunError for a full, failing,
    read-only or forbidden disk.
    """
    path = pathlib.Path(path)
    with explained(path, size), replacing(path) as file:
        yield file


def link_or_copy(source: Path, target: Path) -> None:
    """A second name of a file that is never written in place, or a durable copy where the file system has no links.

    The name is durable after `sync` of its folder. Raises RunError as `open_atomic` does.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        with open(source, "rb") as file, open_atomic(target, os.fstat(file.fileno()).st_size) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)


def remove_leftovers(folder: Path) -> list[pathlib.Path]:
    """Remove, below `folder`, the temporary files of processes that died while writing; returns what was removed."""
    removed = []
    for temporary in sorted(pathlib.Path(folder).rglob(f".*{_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError), temporary.open("rb") as file:
            if lock_descriptor(file.fileno()):
                temporary.unlink()
                removed.append(temporary)
    return removed


class WholeFolder:
    """A folder that takes its name when it is whole: context manager over the one to write into, which replaces `path`.

    A folder cannot be renamed onto a full one, so the old one is set aside for the moment between two renames. A
    process that is killed leaves `path` old or new, or, between the two, set aside under `retired`; the next `begin`
    puts that back and removes what is left over. The processes of a group have one of them call `begin` and `complete`.
    Raises OSError when it cannot be written, RunError while another process writes it; `path` then stays as it was.

    Attributes:
      path: the folder to be.
      staging: the folder to write into, beside it.
      retired: the name of the old one between the two renames.
    """

    def __init__(self, path: Path):
        self.path = pathlib.Path(path).absolute()
        self.staging = self.path.with_name(self.path.name + ".tmp")
        self.retired = self.path.with_name(self.path.name + ".old")
        self._descriptor: int | None = None

    def begin(self) -> pathlib.Path:
        """Make `staging`, empty and locked; returns it. The lock tells it from what a killed process left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.staging.exists():
            if not self._lock():
                raise RunError(
                    f"{self.path}: another process is writing it; wait until it ends, or choose another name"
                )
            self._unlock()
            shutil.rmtree(self.staging)
        if self.retired.exists():
            if self.path.exists():
                shutil.rmtree(self.retired)
            else:
                os.replace(self.retired, self.path)
        self.staging.mkdir()
        self._lock()
        return self.staging

    def complete(self) -> None:
        """Give `staging` its name once all of it is on the disk."""
        for place, _, names in os.walk(self.staging):
            for name in names:
                sync(pathlib.Path(place, name))
            sync(pathlib.Path(place))
        replaced = self.path.exists()
        if replaced:
            os.replace(self.path, self.retired)
        try:
            os.replace(self.staging, self.path)
        except OSError:
            if replaced:
                os.replace(self.retired, self.path)
            raise
        sync(self.path.parent)
        self._unlock()
        shutil.rmtree(self.retired, ignore_errors=True)

    def discard(self) -> None:
        """Remove `staging`; `path` stays as it was."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self._unlock()

    def _lock(self) -> bool:
        """Whether no other process writes `staging`; where folders cannot be locked it is taken for left over."""
        self._descriptor = os.open(self.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            if not lock_descriptor(self._descriptor):
                self._unlock()
                return False
        return True

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> pathlib.Path:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self.complete()
        except BaseException:
            self.discard()
            raise
