"""The log of a run: its events, and Python's stacks when native code crashes."""

from __future__ import annotations

import faulthandler
import logging
import pathlib
from typing import IO

from qjax.errors import RunError

__all__ = ["crashes_to", "log_to"]

_log = logging.getLogger("qjax")


def log_to(path: pathlib.Path) -> logging.Handler:
    """Append what the library logs to `path`, until the handler is removed. Raises RunError when that is impossible."""
    try:
        handler = logging.FileHandler(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another out=") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False  # the file is the log; the terminal has the progress display
    return handler


def crashes_to(path: pathlib.Path) -> IO[str] | None:
    """The file that gets Python's stacks when native code crashes; None when a test runner takes them already."""
    if faulthandler.is_enabled():
        return None
    file = path.open("a")
    faulthandler.enable(file)
    return file
