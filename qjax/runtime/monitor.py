"""Measurements of a run: peak memory, compiled programs, seconds by stage with compile time apart."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax

from qjax.runtime.ahead import WAITED

__all__ = ["CompileCounter", "Stopwatch", "device_peak_memory_bytes", "memory_bytes", "peak_memory_bytes"]

# Wraps both a compilation and a load from the persistent cache, so counts do not depend on the state of the cache.
_PROGRAM = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    with contextlib.suppress(OSError):  # Linux: ru_maxrss survives exec and would count the parent's memory
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def device_peak_memory_bytes() -> int | None:
    """The largest memory in use so far over local devices, in bytes; None where the backend keeps no count (CPU)."""
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [count for count in counts if count is not None]
    return max(known) if known else None


class CompileCounter:
    """Context manager that counts the XLA programs made while it is open.

    Attributes:
      programs: their names, in order; one loaded from the persistent compilation cache counts like one compiled.
      from_cache: how many of them the persistent cache served.
      seconds: of the thread that opened it in the XLA compiler, in loading from the cache, and in waiting for programs
        that other threads compile ahead (tracing and lowering are not in it).
    """

    def __init__(self) -> None:
        self.programs: list[str] = []
        self.from_cache = 0
        self.seconds = 0.0
        self._thread = 0

    @property
    def count(self) -> int:
        """The number of programs made."""
        return len(self.programs)

    def __enter__(self) -> CompileCounter:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if event == _PROGRAM:
            self.programs.append(str(details.get("fun_name", "?")))
        if event in (_PROGRAM, WAITED) and threading.get_ident() == self._thread:
            self.seconds += duration_secs

    def _on_event(self, event: str, **details: Any) -> None:
        if event == _CACHE_HIT:
            self.from_cache += 1


class Stopwatch:
    """Seconds by stage; a stage inside another pauses the outer one, so the stages add up to the whole.

    `compiles` is an open CompileCounter whose seconds are taken out of the stages into `compile`; without one, stages
    hold their compile time.
    """

    def __init__(self, compiles: CompileCounter | None = None, clock: Callable[[], float] = time.perf_counter):
        self._compiles = compiles
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._compiled = 0.0
        self._mark = (0.0, 0.0)
        self._programs: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._made = self._peak = 0

    def _read(self) -> tuple[float, float]:
        return self._clock(), 0.0 if self._compiles is None else self._compiles.seconds

    def _book(self) -> None:
        """Give the time since the last mark to the innermost open stage."""
        now = self._read()
        if self._stack:
            compiled = now[1] - self._mark[1]
            self._compiled += compiled
            self._seconds[self._stack[-1]] += now[0] - self._mark[0] - compiled
            made = 0 if self._compiles is None else self._compiles.count
            self._programs[self._stack[-1]] = self._programs.get(self._stack[-1], 0) + made - self._made
            self._peak = max(self._peak, peak_memory_bytes())  # the kernel's own count is not quite monotonic
            self._peaks[self._stack[-1]] = self._peak
        self._made = 0 if self._compiles is None else self._compiles.count
        self._mark = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`; a name used again adds up."""
        self._seconds.setdefault(name, 0.0)
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    @property
    def stages(self) -> dict[str, dict[str, int]]:
        """By stage: programs compiled in it, and the process's largest memory up to its end (it never falls)."""
        return {
            name: {"compiled_programs": self._programs.get(name, 0), "peak_memory_bytes": self._peaks.get(name, 0)}
            for name in self._seconds
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage up to the last change of stage, and `compile`: the compile time of all stages together."""
        return {**self._seconds, "compile": self._compiled}
