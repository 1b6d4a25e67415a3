"""Block sizes of every kernel that can run here, and which GPU kernel comes first, found by trying."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dequant_matmul, hadamard
from pallas_kernels.bench.cases import RATE, packed
from pallas_kernels.bench.timing import attempt, chained, in_threads, prepared, ring
from pallas_kernels.dequant_matmul import pallas_gpu, pallas_mosaic_gpu, pallas_tpu
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.dispatch import backend
from pallas_kernels.hadamard.specs import BENCHES as TRANSFORMS

__all__ = ["SPECS", "tune"]

SPECS = (
    Spec(4, 1, 8192, 8192),
    Spec(2, 1, 8192, 8192),
    Spec(2, 1, 8192, 8192, None, "mul1"),
    Spec(2, 16, 8192, 8192, None, "mul1"),
    Spec(2, 16, 8192, 8192),
)
"""Those that targets are set for."""
_KERNELS: dict[str, tuple[str, Any]] = {
    "mosaic_gpu": ("dequant_matmul mosaic_gpu", pallas_mosaic_gpu),
    "pallas_gpu": ("dequant_matmul", pallas_gpu),
    "pallas_tpu": ("dequant_matmul", pallas_tpu),
}

_TOGETHER = 16
"""Candidates that are compiled before they are timed."""

Found = dict[str, dict[str, dict[str, int]]]


def tune(ring_bytes: int, begun: float, until: float) -> Found:
    """By operation and key, the fastest of a kernel's CANDIDATES, and where Mosaic's kernel was the faster one.

    Kernels share the time from `begun` to `until` equally: one that needs less leaves more to the next.
    """
    found: Found = {}
    weight = packed(SPECS[0], jax.random.key(0)) if backend() != "cpu" else None
    names = [] if weight is None else dequant_matmul.available(1, jnp.bfloat16, weight)
    names = [name for name in _KERNELS if name in names]
    best: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        deadline = until - (until - time.monotonic()) * (len(names) - 1 - i) / (len(names) - i)
        for spec in SPECS:
            key, blocks, seconds = _best_blocks(name, spec, ring_bytes, deadline)
            if blocks:
                found.setdefault(_KERNELS[name][0], {})[key] = blocks
                best.setdefault(pallas_mosaic_gpu.key(spec.batch, packed_shape(spec)), {})[name] = seconds
    first = mosaic_first(best)
    if "mosaic_gpu" in names and "pallas_gpu" in names:
        transforms = {f"order {spec.block}": _transform_seconds(spec, ring_bytes) for spec in TRANSFORMS}
        found["hadamard first choice"] = mosaic_first(transforms)
    found["dequant_matmul first choice"] = first
    return {operation: keys for operation, keys in found.items() if keys}


def mosaic_first(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """`{key: {"mosaic_gpu": 1}}` for the keys for which both GPU kernels were timed and Mosaic's took less."""
    both = {key: own for key, own in seconds.items() if {"mosaic_gpu", "pallas_gpu"} <= set(own)}
    return {key: {"mosaic_gpu": 1} for key, own in both.items() if own["mosaic_gpu"] < own["pallas_gpu"]}


def packed_shape(spec: Spec) -> Any:
    """A packed matrix of shapes, of which its key is made."""
    return jax.eval_shape(functools.partial(packed, spec), jax.random.key(0))


def fastest(
    candidates: Sequence[Mapping[str, int]],
    prepare: Callable[[Mapping[str, int]], Callable[[], float]],
    until: float,
    what: str,
) -> tuple[dict[str, int], float]:
    """(the best candidate, its seconds); those that raise are named and left out. Empty when there was no time.

    Candidates are compiled side by side, a few at a time, and timed one after another.
    """
    best: dict[str, int] = {}
    least = math.inf
    for start in range(0, len(candidates), _TOGETHER):
        if time.monotonic() > until:
            break
        some = candidates[start : start + _TOGETHER]
        for blocks, ready in zip(some, in_threads([functools.partial(prepare, b) for b in some]), strict=True):
            seconds = ready if isinstance(ready, Exception) else attempt(ready)
            if isinstance(seconds, Exception):
                print(f"tune {what} {dict(blocks)}: {type(seconds).__name__}", flush=True)
            elif seconds < least:
                best, least = dict(blocks), seconds
                print(f"tune {what} {best}: {least * 1e6:.1f} µs", flush=True)
    return best, least


def _best_blocks(name: str, spec: Spec, ring_bytes: int, until: float) -> tuple[str, dict[str, int], float]:
    kernel = _KERNELS[name][1]
    shapes = packed_shape(spec)
    key = kernel.key(shapes) if name == "pallas_tpu" else kernel.key(spec.batch, shapes)
    if time.monotonic() > until:
        return key, {}, math.inf
    weights = ring(functools.partial(packed, spec), shapes.nbytes, ring_bytes)
    if name == "mosaic_gpu":
        weights = [dequant_matmul.to_rows(weight) for weight in weights]
    x = jax.random.normal(jax.random.key(1), (spec.batch, spec.inner), jnp.bfloat16)
    candidates = kernel.candidates(spec.batch) if name == "pallas_gpu" else kernel.CANDIDATES

    def prepare(blocks: Mapping[str, int]) -> Callable[[], float]:
        step = functools.partial(kernel.matmul, blocks=blocks)
        measure = prepared(step, x, weights, expected=shapes.nbytes / RATE[backend()], repeats=3)
        return lambda: measure().median

    return key, *fastest(candidates, prepare, until, f"{name} {key}")


def _transform_seconds(spec: Any, ring_bytes: int) -> dict[str, float]:
    shape = (spec.rows, spec.n)
    rows = ring(lambda key: jax.random.normal(key, shape, jnp.bfloat16), 2 * spec.rows * spec.n, ring_bytes)
    found = {}
    for name in hadamard.available(spec.block, jnp.bfloat16):
        f = functools.partial(hadamard.hadamard, block=spec.block, implementation=name)
        expected = 4 * spec.rows * spec.n / RATE[backend()]
        x = jnp.zeros((1, 1), jnp.bfloat16)
        found[name] = chained(lambda x, rows, f=f: f(rows + x), x, rows, expected=expected, repeats=3).median
    return found
