"""Seconds per call on a device, without the time to start a program.

One compiled loop runs the calls one after another. Call i + 1 waits for call i: `x + (y[0] > 3e38)` is x, and the
compiler does not know it. The weights are a ring of copies larger than the caches, so none is found there. What the
chain itself costs, an addition to x, stays in the time; `rooflines.measure` has it alone, as `chain_seconds`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["HOW", "Measured", "attempt", "busy_seconds", "chained", "in_threads", "prepared", "ring"]

HOW = (
    "median over repeats of one compiled loop of dependent calls, divided by the calls; weights cycle through a ring "
    "of copies of at least ring_bytes, more than the last-level cache; the addition that chains the calls is included. "
    "busy_microseconds: what the device computes in a call by the profiler, all kernels, that addition's included"
)
_HUGE = 3e38
_MARK = "timed "


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds per call of every repeat, how many calls a repeat has; `again` runs one more."""

    seconds: tuple[float, ...]
    calls: int
    compile_seconds: float
    again: Callable[[], None] | None = None

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Microseconds per call, repeats, calls of a repeat, seconds of the compiler."""
        return {
            "microseconds_median": self.median * 1e6,
            "microseconds_min": min(self.seconds) * 1e6,
            "microseconds_max": max(self.seconds) * 1e6,
            "repeats": len(self.seconds),
            "calls_per_repeat": self.calls,
            "compile_seconds": self.compile_seconds,
        }


def ring(make: Callable[[jax.Array], Any], nbytes: int, ring_bytes: int, most: int = 8) -> list[Any]:
    """Copies `make(key)` of weights of `nbytes`: at least two, and `ring_bytes` together, but no more than `most`."""
    count = min(max(2, -(-ring_bytes // max(nbytes, 1))), most)
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def prepared(
    step: Callable[[Any, Any], Any],
    x: Any,
    weights: Sequence[Any],
    *,
    expected: float,
    least_seconds: float = 0.01,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], Measured]:
    """Compile what `chained` times; the function that is returned runs it. Several threads may prepare at once."""
    rounds = min(max(1, round(least_seconds / (max(expected, 1e-7) * len(weights)))), 1000)

    def loop(x: Any, weights: Sequence[Any]) -> Any:
        def body(_: Any, x: Any) -> Any:
            for weight in weights:
                own, held = jax.lax.optimization_barrier((x, weight))  # nothing of the weight's leaves the loop
                y = jax.lax.optimization_barrier(step(own, held))
                first = jax.lax.slice(y, (0,) * y.ndim, (1,) * y.ndim).reshape((1,) * x.ndim)
                x = x + (first.astype(jnp.float32) > _HUGE).astype(x.dtype)
            return x

        return jax.lax.fori_loop(0, rounds, body, x)

    start = clock()
    program = jax.jit(loop).lower(x, list(weights)).compile()
    compile_seconds = clock() - start

    def measure() -> Measured:
        jax.block_until_ready(program(x, list(weights)))
        seconds = []
        for _ in range(repeats):
            start = clock()
            jax.block_until_ready(program(x, list(weights)))
            seconds.append((clock() - start) / (rounds * len(weights)))
        return Measured(tuple(seconds), rounds * len(weights), compile_seconds, again)

    def again() -> None:
        jax.block_until_ready(program(x, list(weights)))

    return measure


def busy_seconds(programs: Mapping[str, Measured]) -> dict[str, float]:
    """Seconds per call that a GPU computes, by the profiler: all kernels of a call, without what lies between them.

    Empty where the profiler shows no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for name, program in programs.items():
                with jax.profiler.TraceAnnotation(f"{_MARK}{name}"):
                    assert program.again is not None
                    program.again()
        traces = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(traces[0])).planes) if traces else []
        spans, kernels = {}, []
        for plane in planes:
            for line in plane.lines:
                if "GPU" in plane.name and line.name.startswith("Stream"):
                    kernels += [(event.start_ns, event.duration_ns) for event in line.events]
                elif "GPU" not in plane.name:
                    marks = (event for event in line.events if event.name.startswith(_MARK))
                    spans.update({m.name[len(_MARK) :]: (m.start_ns, m.start_ns + m.duration_ns) for m in marks})
    found = {
        name: sum(lasts for at, lasts in kernels if spans[name][0] <= at < spans[name][1]) / 1e9 / program.calls
        for name, program in programs.items()
        if name in spans
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def chained(step: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any], **options: Any) -> Measured:
    """Time `step(x, w) -> y`, x and y of floating point, over the ring `weights`.

    Args:
      expected: seconds of a call, roughly: a repeat has as many rounds of the ring as should take `least_seconds`.
      **options: see `prepared`.
    """
    return prepared(step, x, weights, **options)()


def attempt(function: Callable[[], Any]) -> Any:
    """The result of the function, or the exception that it raised."""
    try:
        return function()
    except Exception as error:
        return error


def in_threads(functions: Sequence[Callable[[], Any]], threads: int = 0) -> list[Any]:
    """`attempt` of every function, in their order; 0 is a thread per two processors."""
    threads = threads or max(1, (os.cpu_count() or 1) // 2)
    if threads == 1 or len(functions) < 2:
        return [attempt(function) for function in functions]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(attempt, functions))
