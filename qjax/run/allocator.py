"""Memory that is freed stays with the process, where the C library would give it back to the kernel at once."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

__all__ = ["keep_freed_memory"]

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
