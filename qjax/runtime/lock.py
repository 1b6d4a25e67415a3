"""Locks on files between processes: a run directory for one, a turn at a cache's entry, a device for a job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from types import TracebackType

import jax

from qjax.errors import RunError

__all__ = ["FileLock", "RunLock", "lock_descriptor", "turn"]

_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES: by file systems that map flock to record locks
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_descriptor(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Whether the open file is now locked (flock); False where another holds it, which `wait` waits for.

    The kernel holds the lock until the descriptor is closed or the process dies, so nothing is left to clean up after a
    kill. Raises OSError where the file system cannot lock.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


class FileLock:
    """Lock on a file of its own: for one holder, who writes its name into it, or shared by several.

    As a context manager it waits for its turn. The file stays when the lock is released: removing it would let two
    processes lock two files of the same name.

    Attributes:
      file: the locked file; it and its folder are made.
      shared: whether others may hold it at the same time, shared as well.
    """

    def __init__(self, file: str | os.PathLike[str], *, shared: bool = False):
        self.file = pathlib.Path(file)
        self.shared = shared
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool) -> bool:
        """Whether the lock is now held. Raises OSError where the file cannot be made or locked."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = lock_descriptor(descriptor, shared=self.shared, wait=wait)
        except BaseException:
            os.close(descriptor)
            raise
        if not locked:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        if not self.shared:
            own = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self._write(json.dumps(own).encode())
        return True

    def release(self) -> None:
        """Give the lock up; nothing happens where it is not held."""
        if self._descriptor is not None:
            if not self.shared:
                self._write(b"")
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, content: bytes) -> None:
        assert self._descriptor is not None
        with contextlib.suppress(OSError):  # on a full disk the holder has no name, but the lock
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)

    def holder(self) -> str:
        """The process that holds it, in words: `process 17 on host, running since …`, or `another process`."""
        try:
            content = json.loads(self.file.read_bytes())
            return f"process {content['pid']} on {content['host']}, running since {content['started']}"
        except (OSError, ValueError, KeyError, TypeError):  # shared, or read while it was being written
            return "another process"

    def __enter__(self) -> FileLock:
        self.acquire(wait=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class RunLock:
    """Context manager: the exclusive use of a run directory until the block ends or the process dies.

    Raises RunError when another process holds it (named), or the directory cannot be written or locked.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunLock:
        try:
            free = self._lock.acquire(wait=False)
        except OSError as error:
            if error.errno in _UNABLE:
                raise RunError(
                    f"{self.path}: its file system cannot lock files ({error.strerror}); choose an out= on a local disk"
                ) from error
            raise RunError(
                f"{self.path}: cannot be used as a run directory ({error.strerror}); choose another out="
            ) from error
        if not free:
            raise RunError(f"{self.path}: in use by {self._lock.holder()}; wait until it ends, or choose another out=")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


@contextlib.contextmanager
def turn(file: pathlib.Path) -> Iterator[None]:
    """Wait until no other process is in a block under the same lock file: what it put into a cache is then there.

    Where the file system cannot lock, or the file cannot be made, the block runs at once: entries of the caches are
    written whole, so that the worst is work done twice. The processes of one `jax.distributed` run do not wait for each
    other either: they are in the block together.
    """
    lock = FileLock(file)
    if jax.process_count() == 1:
        with contextlib.suppress(OSError):
            lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
