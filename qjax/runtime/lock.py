"""One process at a time in a run directory."""

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

__all__ = ["RunLock", "turn"]


class RunLock:
    """Context manager: the exclusive use of a run directory until the block ends or the process dies.

    The kernel holds the lock (flock on the file `.lock`), so nothing is left to clean up after a kill. The file tells
    others who holds it: process id, host and start time. Raises RunError when another process holds it (named), or the
    directory cannot be written or locked.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be used as a run directory ({error.strerror}); choose another out="
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(
                    f"{self.path}: its file system cannot lock files ({error.strerror}); choose an out= on a local disk"
                ) from error
            raise RunError(f"{self.path}: in use by {holder}; wait until it ends, or choose another out=") from error
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The file stays: removing it would let two processes lock two files of the same name.
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def turn(file: pathlib.Path) -> Iterator[None]:
    """Wait until no other process is in a block under the same lock file: what it put into a cache is then there.

    Where the file system cannot lock, or the file cannot be made, the block runs at once: entries of the caches are
    written whole, so that the worst is work done twice. The processes of one `jax.distributed` run do not wait for each
    other either: they are in the block together.
    """
    if jax.process_count() > 1:
        yield
        return
    descriptor = None
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {content['pid']} on {content['host']}, running since {content['started']}"
    except (ValueError, KeyError, TypeError):  # read while it was being written
        return "another process"
