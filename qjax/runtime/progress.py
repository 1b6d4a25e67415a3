"""Progress with the time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, cast, runtime_checkable

from qjax.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["STALL", "Progress", "Stream", "duration", "silent"]

# Seconds: longer than any step of a model that fits one machine has taken.
STALL = 1800.0
_log = logging.getLogger("qjax")
_silent = contextvars.ContextVar("qjax_silent", default=False)


@contextlib.contextmanager
def silent(quiet: bool = True) -> Iterator[None]:
    """Nothing is shown of the progress that is made in the block (with `quiet` false all of it)."""
    token = _silent.set(quiet)
    try:
        yield
    finally:
        _silent.reset(token)


@runtime_checkable
class Stream(Protocol):
    """A text stream that can be written to."""

    def write(self, text: str, /) -> object:
        """Take some text."""
        ...

    def flush(self) -> None:
        """Pass on what was written."""
        ...

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        ...


def duration(seconds: float) -> str:
    """`h:mm:ss` of a number of seconds."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class Progress:
    """Context manager that reports `done` of `total` units of work.

    Args:
      label: what is being done.
      total: units of work, at least 0.
      done: units that were done before (a resumed run); they do not count for the time left.
      stream: where to write, standard output by default; a terminal gets a bar.
      interval: seconds between two plain lines; the last one is always written.
      stall: seconds without any progress after which it is said, once per standstill, on the stream and in the log;
        None: never, and no thread is started.
      clock: seconds, monotonic.
    Raises InputError for a negative total, or more done than there is.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        stream: Stream | None = None,
        interval: float = 5.0,
        stall: float | None = STALL,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not 0 <= done <= total:
            raise InputError(f"progress of {label!r}: {done} of {total} is no progress; need 0 <= done <= total")
        self.label, self.total, self.done = label, total, done
        self._before = done
        self._stream = sys.stdout if stream is None else stream
        self._interval, self._clock = interval, clock
        self._start = clock()
        self._last: float | None = None
        self._written = -1
        self._note = ""
        self._bar: RichProgress | None = None
        self._silent = _silent.get()
        self._stall, self._moved = stall, clock()
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        self._start = self._moved = self._clock()
        if self._stall is not None:
            threading.Thread(target=self._watch, args=(self._stall,), name="qjax stall watch", daemon=True).start()
        if self._silent:
            return self
        if self._stream.isatty():
            from rich.console import Console  # here: a terminal alone needs it
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[note]}"),
                console=Console(file=cast(IO[str], self._stream)),
                speed_estimate_period=600.0,  # a step may take minutes
            )
            self._task = bar.add_task(self.label, total=self.total, completed=self.done, note="")
            bar.start()
            self._bar = bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        elif self._written != self.done:
            self._write()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report `units` more as done; `note` says which."""
        self.update(self.done + units, note)

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` units in all are done; `note` says which was the last."""
        self.done, self._note, self._moved = done, note, self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = self._clock()
        if self._last is None or now - self._last >= self._interval or done >= self.total:
            self._write()

    def seconds_left(self) -> float | None:
        """Seconds to the end at the average pace so far; None before the first unit."""
        fresh = self.done - self._before
        if fresh <= 0:
            return None
        return (self._clock() - self._start) / fresh * (self.total - self.done)

    def _watch(self, stall: float) -> None:
        told = -1
        while not self._ended.wait(stall / 4):
            still = self._clock() - self._moved
            if still < stall or told == self.done:
                continue
            told = self.done
            last = f", after {self._note}" if self._note else ""
            text = f"{self.label}: nothing has moved for {duration(still)} at {self.done}/{self.total}{last}"
            _log.warning("%s", text)
            with contextlib.suppress(ValueError, OSError):  # the stream may be closed already
                print(f"warning: {text}", file=cast(IO[str], self._stream), flush=True)

    def _write(self) -> None:
        if self._silent:
            return
        self._last, self._written = self._clock(), self.done
        percent = 100.0 if self.total == 0 else 100.0 * self.done / self.total
        left = self.seconds_left()
        columns = [
            f"{self.label} {self.done}/{self.total}",
            f"{percent:5.1f}%",
            f"elapsed {duration(self._last - self._start)}",
            f"left {'?' if left is None else duration(left)}",
            self._note,
        ]
        print("  ".join(column for column in columns if column), file=cast(IO[str], self._stream), flush=True)
