"""Memory: what is freed is given back, programs are forgotten in time; what runs out is met with smaller batches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from qjax.errors import RunError
from qjax.runtime.monitor import device_peak_memory_bytes, memory_bytes, peak_memory_bytes

__all__ = [
    "forget_programs",
    "keep_freed_memory",
    "out_of_memory",
    "return_freed_memory",
    "returning_memory",
    "shrinking",
]

_COMPILED = "/jax/core/compile/backend_compile_duration"

T = TypeVar("T")


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, None where it has none."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).malloc_trim
    return None


class _Held:
    """What this process held when memory was last given back."""

    bytes = 0


def return_freed_memory(grown: int = 0) -> None:
    """Give the operating system back what this process has freed: the C library keeps it for allocations to come.

    With `grown`, only when the process holds that many bytes more than after the last time: looking is a thousand times
    cheaper than walking through all that is free.
    """
    trim = _trim()
    if trim is None or (grown and memory_bytes() < _Held.bytes + grown):
        return
    trim(0)
    _Held.bytes = memory_bytes()


def mapped_regions() -> int:
    """How many regions of memory this process has mapped; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    return 0


def _most_regions() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    return 65_530


def forget_programs(share: float = 0.4) -> bool:
    """Drop all compiled programs once they hold `share` of the regions that Linux lets one process map; whether it did.

    On a CPU a program maps hundreds of regions, one for each function in it, and at the limit (vm.max_map_count) LLVM
    aborts the process. A program that is needed again comes from the compilation cache.
    """
    if mapped_regions() <= share * _most_regions():
        return False
    jax.clear_caches()
    gc.collect()
    return True


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """While open, memory that the compiler has freed goes back to the operating system before the program runs.

    The compiler needs hundreds of megabytes for a large program, in many small pieces that the arrays of the run cannot
    use: without this, the peak is the sum of the two and not the larger one.
    """

    def on_duration(event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILED and duration_secs > 0.5:  # small programs leave little; a trim takes milliseconds
            return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the device or on the host."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def _asked(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    match = re.search(r"allocat\w* (\d+(?:\.\d+)? ?\w*)", text)
    return f"asked for {match[1]}" if match else text.splitlines()[0][:200]


def shrinking(step: Callable[[int], T], batch: int, where: Callable[[], str], tell: Callable[[str], None]) -> T:
    """`step(batch)`, again with half the batch whenever memory runs out.

    `where` says what was being worked on, `tell` is given a sentence per retry. Raises RunError, with what was asked
    for and what was used, when a batch of one does not fit.
    """
    while True:
        try:
            return step(batch)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            asked = _asked(error)
            if batch == 1:
                used = device_peak_memory_bytes()
                device = "" if used is None else f"device {used / 2**30:.2f} GiB, "
                raise RunError(
                    f"memory is used up at {where()} with one sequence per step ({asked}; peak use {device}"
                    f"host {peak_memory_bytes() / 2**30:.2f} GiB); use a shorter data.length, model.dtype=bfloat16, "
                    "or a device with more memory"
                ) from error
        # Outside the handler, where the error and the arrays that its frames hold are gone.
        batch //= 2
        tell(f"memory is used up at {where()} ({asked}); going on with {batch} sequences per step")


# mallopt(3) of glibc: never trim the heap's end; no mappings of their own for large arrays; one heap for all threads.
_OPTIONS = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process use freed memory again without asking the kernel; returns whether that was arranged.

    On a CPU every step of a program allocates and frees its arrays. glibc maps each large one anew, and the kernel
    clears it page by page: a ninth of a sketch's time. Kept memory is the process's peak, which it needs
    again in the next step. Before the first large array. Only with glibc, and not where the environment tunes its
    allocator (GLIBC_TUNABLES or MALLOC_*).
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in environment)
    if tuned or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt that does nothing
        return False
    done = [library.mallopt(option, value) for option, value in _OPTIONS.values()]
    return all(result == 1 for result in done)
