"""The policy for memory that the process has freed: a step's is kept for the next step, a phase's goes back at its end.

On a CPU every step of a program allocates and frees its arrays. glibc maps each large one anew, and the kernel clears
it page by page: a ninth of a sketch's time. So freed memory is kept (`keep_between_steps`): it is the process's peak,
which the next step needs again. What compiling a program or rounding a matrix leaves lies in pieces that the arrays of
the next phase cannot use, and the peak would be the sum of both instead of the larger one. So it is given back at the
end of such a phase (`give_back`, `giving_back`).

The two do not exclude each other: `malloc_trim(0)` returns whole free pages from anywhere in the heap, also where
M_TRIM_THRESHOLD is -1 and M_MMAP_MAX is 0. Of 124 MiB, freed in small blocks, 10 stay resident, and of 210 MiB in four
large ones, of which one is in use, 60 (9 and 59 with glibc's defaults). On SmolLM2 (LDLQ, 16 sequences of 512, two busy
cores) giving back alone made 5.2 million page faults and 23 s of system time until the 19th of 30 blocks of Hessians;
with freed memory kept, and nothing given back, the whole run made 0.22 million and 4 s. On `tiny`, programs compiled
anew, giving back as well costs 91 thousand faults and 0.8 s of system time; the peak is 0.490 GiB instead of 0.505.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qjax.runtime.monitor import memory_bytes

__all__ = ["give_back", "giving_back", "keep_between_steps"]

# mallopt(3) of glibc: never trim the heap's end; no mappings of their own for large arrays; one heap for all threads.
_OPTIONS = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_between_steps(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process use freed memory again without asking the kernel; returns whether that was arranged.

    Before the first large array. Only with glibc, and not where the environment tunes its allocator (GLIBC_TUNABLES or
    MALLOC_*).
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in environment)
    if tuned or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt that does nothing
        return False
    done = [library.mallopt(option, value) for option, value in _OPTIONS.values()]
    return all(result == 1 for result in done)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, None where it has none."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).malloc_trim
    return None


class _Held:
    """The memory of this process when it was last given back."""

    bytes = 0


def give_back(grown: int = 0) -> None:
    """Give the operating system back what this process has freed, at the end of a phase.

    With `grown`, only when the process holds that many bytes more than after the last time: looking is a thousand times
    cheaper than walking through all that is free.
    """
    trim = _trim()
    if trim is None or (grown and memory_bytes() < _Held.bytes + grown):
        return
    trim(0)
    _Held.bytes = memory_bytes()


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """While open, memory that the compiler has freed goes back to the operating system before the program runs."""

    def on_duration(event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILED and duration_secs > 0.5:  # small programs leave little; a trim takes milliseconds
            give_back()

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
