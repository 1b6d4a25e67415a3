"""Memory that runs out: programs are forgotten in time, and batches become smaller."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import re
from collections.abc import Callable
from typing import TypeVar

import jax

from qjax.errors import RunError
from qjax.runtime.monitor import device_peak_memory_bytes, peak_memory_bytes

__all__ = ["forget_programs", "out_of_memory", "shrinking"]

T = TypeVar("T")


def mapped_regions() -> int:
    """The number of regions of memory that this process has mapped; 0 where the system does not say."""
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
