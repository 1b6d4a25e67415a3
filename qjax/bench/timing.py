"""Timing of compiled programs side by side, so that other load of the machine falls on all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from qjax.errors import InputError
from qjax.runtime.fingerprint import device, versions

__all__ = ["Program", "Timing", "compiled", "interleaved", "surroundings"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program with its arguments bound.

    Attributes:
      call: runs it once and waits for its results.
      trace_seconds: Python tracing and lowering.
      compile_seconds: XLA's compiler.
      temporary_bytes: memory it needs besides arguments and results; None where the backend does not say.
    """

    call: Callable[[], Any]
    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Repeats, least, median and largest seconds."""
        return {
            "repeats": len(self.seconds),
            "seconds_min": min(self.seconds),
            "seconds_median": self.median,
            "seconds_max": max(self.seconds),
        }

    def relative(self, base: Timing) -> float:
        """The median over repeats of `base seconds / own seconds` of the same round."""
        return statistics.median(b / s for b, s in zip(base.seconds, self.seconds, strict=True))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """No persistent compilation cache; JAX decides once whether it has one, so it must be made to ask again."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def compiled(function: Callable[..., Any], *arguments: Any, clock: Callable[[], float] = time.perf_counter) -> Program:
    """Compile `function` for the arguments, past the persistent cache, so that the compile time is the compiler's."""
    with _without_cache():
        start = clock()
        lowered = jax.jit(function).lower(*arguments)
        traced = clock()
        program = lowered.compile()
        end = clock()
    memory = program.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    return Program(lambda: jax.block_until_ready(program(*arguments)), traced - start, end - traced, temporary)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    least_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds of every call in rounds of all calls, after one round that is not counted.

    At least `repeats` rounds, and more, up to 50 times as many, until they took `least_seconds`. Raises InputError for
    fewer than one repeat.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; it is at least 1")
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    rounds = 0
    while rounds < repeats or (spent < least_seconds and rounds < 50 * repeats):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
            spent += seconds[name][-1]
        rounds += 1
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def surroundings(load_before: Sequence[float] | None = None) -> dict[str, Any]:
    """Conditions of a measurement: device, versions, and the load average (1, 5, 15 minutes) before and now."""
    return {
        "device": device(),
        "versions": versions(),
        "load_average_before": None if load_before is None else list(load_before),
        "load_average_after": list(load_average()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def load_average() -> tuple[float, float, float]:
    """Runnable processes, averaged over 1, 5 and 15 minutes; zeros where the system does not count them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
