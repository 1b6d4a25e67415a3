"""A run of several processes in one directory: process 0 holds it, writes and speaks; the others follow."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax

from qjax.errors import RunError
from qjax.runtime.distributed import is_primary, on_all, on_primary
from qjax.runtime.lock import RunLock

__all__ = ["leading", "speaking", "visible"]


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Only process 0 prints."""
    with contextlib.ExitStack() as stack:
        if not is_primary():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def leading(path: pathlib.Path) -> Iterator[None]:
    """Process 0 holds the run directory's lock; the others print nothing. Raises as `RunLock`, in all processes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(speaking())

        def hold() -> None:
            stack.enter_context(RunLock(path))

        on_primary(hold)
        yield


def visible(file: pathlib.Path) -> None:
    """Check that all processes see a file that process 0 has written. Raises RunError, in all, when one does not."""

    def check() -> None:
        if not file.exists():
            raise RunError(
                f"{file}: process 0 has written it and process {jax.process_index()} does not see it; all processes "
                "need the same folders: choose an out= and cache= on a file system that they share"
            )

    on_all(check)
