"""Rounding of float32 magnitudes to a grid of powers of two, in integers.

A magnitude is the 31 bits of a float32 without its sign: as integers they are ordered as the numbers are, and adding to
the mantissa carries into the exponent. No floating-point operation takes part, so that subnormals, which XLA flushes to
zero on a CPU, are rounded as all other numbers are.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

__all__ = ["INFINITY", "LARGEST", "NAN", "ROUNDINGS", "bits_of_product", "floor_log2", "magnitude", "round_magnitude"]
__all__ += ["with_sign"]

ROUNDINGS = ("nearest", "nearest_away", "nearest_down", "toward_zero", "stochastic")
"""Ties to even, away from zero, towards zero; towards zero always; one of the two neighbours by chance."""

INFINITY, NAN, LARGEST = 0x7F80_0000, 0x7FC0_0000, 0x7F7F_FFFF  # float32's
_HIDDEN = 0x80_0000

Exponent: TypeAlias = int | Array


def magnitude(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The bits of |x|."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFF_FFFF


def with_sign(bits: UInt32[Array, "*shape"], x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The number of magnitude `bits` with the sign of x."""
    sign = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x8000_0000)
    return jax.lax.bitcast_convert_type(bits | sign, jnp.float32)


def floor_log2(bits: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """`floor(log2 x)` of the magnitudes of positive numbers, subnormals too; −150 of zero."""
    subnormal = -118 - jax.lax.clz(bits).astype(jnp.int32)
    return jnp.where(bits >= _HIDDEN, (bits >> 23).astype(jnp.int32) - 127, subnormal)


def _leading(significand: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """The place of the leading one of integers below 2^24; to convert them is cheaper than to count."""
    exact = significand.astype(jnp.int32).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(exact, jnp.int32) // 2**23 - 127


def bits_of_product(significand: int, exponent: Exponent) -> UInt32[Array, "*shape"]:
    """The magnitude of `significand · 2^exponent`, significand < 2^24; float32's largest where it is larger.

    Exact where the product is a float32, which asks for exponents of at least −149.
    """
    exponent = jnp.asarray(exponent, jnp.int32)
    width = significand.bit_length()
    top = exponent + (width - 1)
    normal = ((jnp.clip(top, -126, 127) + 127) << 23) + ((significand << (24 - width)) - _HIDDEN)
    subnormal = jnp.int32(significand) << jnp.clip(exponent + 149, 0, 24)
    found = jnp.where(top >= -126, normal, subnormal).astype(jnp.uint32)
    return jnp.where(top > 127, jnp.uint32(LARGEST), found)


def round_magnitude(
    bits: UInt32[Array, "*shape"],
    least: Exponent,
    mantissa: int | None,
    rounding: str,
    words: UInt32[Array, "*shape"] | None,
) -> UInt32[Array, "*shape"]:
    """Magnitudes rounded to multiples of `2^least` of at most `mantissa + 1` significant bits, of any size.

    Args:
      bits: of finite numbers; of others the result has no meaning.
      least: the exponent of the smallest positive number, one for all or broadcastable to `bits`; at least −149.
      mantissa: bits after the leading one, None for a grid of equal steps.
      words: uniform random words for "stochastic", which rounds up with the probability of the discarded fraction:
        exactly where it has at most 32 bits, else within 2^−32 of a step.
    """
    field = (bits >> 23).astype(jnp.int32)
    significand = jnp.where(field > 0, (bits & (_HIDDEN - 1)) | _HIDDEN, bits)
    lost = jnp.maximum((150 + least) - jnp.maximum(field, 1), 0)
    if mantissa is not None:
        coarse = isinstance(least, int) and least >= -126 - mantissa  # no subnormal of float32 has so many bits
        lost = jnp.maximum(lost, (23 if coarse else _leading(significand)) - mantissa)
    places = jnp.minimum(lost, 26).astype(jnp.uint32)  # 26: everything is far below half a step
    step = jnp.uint32(1) << places
    rest = significand & (step - 1)
    half = step >> 1
    if rounding == "nearest":
        up = (rest + ((significand >> places) & 1) > half) & (rest > 0)
    elif rounding == "nearest_away":
        up = (rest >= half) & (rest > 0)
    elif rounding == "nearest_down":
        up = rest > half
    elif rounding == "stochastic":
        assert words is not None
        shift = jnp.clip(31 - lost, 0, 31).astype(jnp.uint32)
        far = jnp.clip(lost - 32, 0, 31).astype(jnp.uint32)
        up = words < jnp.where(lost < 32, (rest << shift) << 1, significand >> far)
    else:
        up = jnp.zeros(bits.shape, bool)
    low = bits - rest + jnp.where(up, step, 0)
    return jnp.where(lost > 23, jnp.where(up, bits_of_product(1, least), 0), low)
