"""Values of trellis states: the computed codes of QTIP and EXL3, and codes with a table.

Every function maps states (integers in [0, 2^L)) to values with a trailing axis of V values per step. All arithmetic is
exact: 32-bit integers that wrap around, and float16 sums formed in float32 (where they are exact) and rounded once.
Source: QTIP (2406.11235), section 3.1; EXL3's format.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from qjax.typing import Leaf

__all__ = [
    "COMPUTED",
    "RMS",
    "TABLES",
    "gaussian_table",
    "hybrid_table",
    "hybrid_values",
    "state_values",
]

_BYTE_SCALE = np.float32(1 / 147.800537109375)  # of a sum of four bytes; a product is the same on every backend
HYBRID_RMS = float(np.sqrt(15 / 16))
"""RMS of HYB's table: √(1 − D), the spread of the best 2-bit reproduction of a Gaussian."""

COMPUTED = ("1mad", "2mad", "3inst", "mul1", "mcg")
"""Codes that are a formula, one value per step."""
TABLES = ("hyb", "lut")
"""Codes with a table (a leaf that fine-tuning may change)."""
RMS = {"1mad": 1.0001, "2mad": 1.0005, "3inst": 1.24371, "mul1": 1.0003, "mcg": 1.2441, "hyb": HYBRID_RMS, "lut": 1.0}
"""Root mean square of the values over all 2^16 states."""


def _byte_sum(x: Array) -> Array:
    # Two bytes at a time: each half of the word holds a sum of at most 510, so nothing carries over.
    pairs = (x & np.uint32(0x00FF00FF)) + ((x >> 8) & np.uint32(0x00FF00FF))
    return (pairs & np.uint32(0xFFFF)) + (pairs >> 16)


def _half(x: Array) -> Array:
    """float32 rounded to the nearest float16 value, which a compiler with excess precision would skip."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def _two_halves(x: Array) -> Array:
    word = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    high, low = (
        jax.lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        for part in (word >> 16, word & np.uint32(0xFFFF))
    )
    return _half(high + low)


def _high_word(x: Array, factor: int) -> Array:
    """Bits 32 to 63 of `x · factor`."""
    low, high = x & np.uint32(0xFFFF), x >> 16
    f_low, f_high = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    middle = high * f_low + ((low * f_low) >> 16)
    carry = (middle & np.uint32(0xFFFF)) + low * f_high
    return high * f_high + (middle >> 16) + (carry >> 16)


def _one_mad(s: Array) -> Array:
    total = _byte_sum(s * np.uint32(34038481) + np.uint32(76625530))
    return (total.astype(jnp.float32) - 510) * _BYTE_SCALE


def _two_mad(s: Array) -> Array:
    x = s * np.uint32(264435761) + np.uint32(1013904223)
    total = _byte_sum(_high_word(x, 1664525) + x)
    return (total.astype(jnp.float32) - 510) * _BYTE_SCALE


def _three_inst(s: Array) -> Array:
    return _two_halves(s * np.uint32(89226354) + np.uint32(64248484))


def _mcg(s: Array) -> Array:
    return _two_halves(s * np.uint32(0xCBAC1FED))


def _mul1(s: Array) -> Array:
    total = _byte_sum(s * np.uint32(0x83DCD12D))
    scale, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float32)
    # A fused float16 multiply-add: 1024 + sum has 11 bits, so float32 holds the product and the sum exactly.
    return _half((total.astype(jnp.float32) + 1024) * scale + shift)


_FORMULAS = {"1mad": _one_mad, "2mad": _two_mad, "3inst": _three_inst, "mul1": _mul1, "mcg": _mcg}


def hybrid_values(states: Integer[Array, "..."], table: Leaf) -> Float[Array, "... V"]:
    """HYB: `h = s (s + 1)`, entry `(h >> (15 − Q)) mod 2^Q` of the table, first value negated by bit 15 of h."""
    s = states.astype(jnp.uint32)
    h = s * (s + np.uint32(1))
    bits = table.shape[0].bit_length() - 1
    index = (h >> (15 - bits)) & np.uint32(table.shape[0] - 1)
    values = jnp.take(table, index.astype(jnp.int32), axis=0, mode="clip").astype(jnp.float32)
    flip = jnp.where((h >> 15) & np.uint32(1) == 1, jnp.float32(-1), jnp.float32(1))
    return jnp.concatenate([values[..., :1] * flip[..., None], values[..., 1:]], axis=-1)


def state_values(code: str, states: Integer[Array, "..."], table: Leaf = None) -> Float[Array, "... V"]:
    """The V values of every state, float32. `table`: HYB's `[2^Q, V]`, or all states' `[2^L, V]` for "lut"."""
    if code in _FORMULAS:
        return _FORMULAS[code](states.astype(jnp.uint32))[..., None]
    assert table is not None
    if code == "hyb":
        return hybrid_values(states, table)
    return jnp.take(table, states.astype(jnp.int32), axis=0, mode="clip").astype(jnp.float32)


@functools.cache
def gaussian_table(entries: int, values: int, seed: int) -> np.ndarray:
    """i.i.d. N(0, 1) `[entries, values]` (QTIP's random codes, RPTC); the same for a seed everywhere."""
    return np.random.default_rng(seed).standard_normal((entries, values)).astype(np.float32)


@functools.cache
def hybrid_table(Q: int, V: int, seed: int) -> np.ndarray:
    """`2^Q` centroids of N(0, I_V) by k-means, scaled to RMS √(15/16), rounded to float16 (HYB's start).

    The centroids are those of the whole plane, as published, not of the half that the sign bit leaves.
    """
    from scipy.spatial import KDTree  # here: it takes a quarter of a second to import

    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((2**17, V))
    centroids = samples[rng.choice(len(samples), 2**Q, replace=False)]
    for _ in range(40):
        nearest = KDTree(centroids).query(samples)[1]
        count = np.bincount(nearest, minlength=2**Q)
        sums = np.stack([np.bincount(nearest, samples[:, i], minlength=2**Q) for i in range(V)], axis=1)
        centroids = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], centroids)
    scaled = centroids * (HYBRID_RMS / centroids.std())
    return scaled.astype(np.float16).astype(np.float32)
