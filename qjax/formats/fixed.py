"""Fixed point: integers of a number of bits times a power of two."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.errors import InputError
from qjax.formats.base import FORMATS, NumberFormat
from qjax.formats.rounding import INFINITY, NAN, bits_of_product, magnitude, round_magnitude, with_sign
from qjax.registry import Count, OneOf

__all__ = ["Fixed", "fixed"]


@dataclasses.dataclass(frozen=True)
class Fixed(NumberFormat):
    """`k · 2^−fraction_bits`, k an integer of `word_bits` bits in two's complement.

    Attributes:
      name: for messages.
      word_bits: 1 to 24 with the sign (2 at least where symmetric): all k are exact in float32.
      fraction_bits: −100 to 100.
      overflow: "clamp" to the ends of the range, or "wrap" around modulo `2^word_bits`, as integers do.
      symmetric: leave out `k = −2^(word_bits − 1)`.
    """

    name: str
    word_bits: Count
    fraction_bits: int
    overflow: Annotated[str, OneOf("clamp", "wrap")] = "clamp"
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.word_bits > 24 or not -100 <= self.fraction_bits <= 100 or (self.symmetric and self.word_bits < 2):
            raise InputError(
                f"format {self.title!r} has word_bits={self.word_bits} and fraction_bits={self.fraction_bits}; there "
                "are 1 to 24 word bits (2 at least where symmetric), so that float32 holds them, and "
                "fraction bits of -100 to 100"
            )
        if self.symmetric and self.overflow == "wrap":
            raise InputError(
                f"format {self.title!r} has overflow=wrap and symmetric=true; numbers wrap around in the whole range: "
                "use overflow=clamp, or symmetric=false"
            )

    @property
    def bits(self) -> int:
        """`word_bits`."""
        return self.word_bits

    @property
    def least(self) -> int:
        """The exponent of the step."""
        return -self.fraction_bits

    @property
    def emax(self) -> int:
        """`floor(log2 ·)` of the largest number."""
        return self.word_bits - 2 - self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        """Bits after the leading one of the largest number."""
        return self.word_bits - 2

    @property
    def largest(self) -> tuple[int, int]:
        """(significand, exponent) of the largest number."""
        return 2 ** (self.word_bits - 1) - 1, self.least

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        return self.round_at(x, 0, rounding, words)

    def round_at(
        self, x: Float32[Array, "*shape"], shift: int | Array, rounding: str = "nearest", words: Array | None = None
    ) -> Float32[Array, "*shape"]:
        """x rounded to the values of the format times `2^shift` (broadcastable to x)."""
        bits = magnitude(x)
        found = round_magnitude(bits, self.least + shift, None, rounding, words)
        nan = bits > INFINITY
        if self.overflow == "wrap":
            nan = nan | (bits == INFINITY)
            span = 2.0**self.word_bits
            k = with_sign(found, x) * 2.0**self.fraction_bits  # a power of two, exact; huge numbers become infinite
            k = k - span * jnp.floor(k / span)
            values = jnp.where(k >= span / 2, k - span, k) * 2.0**-self.fraction_bits
            return jnp.where(nan, jnp.nan, values)
        top = self._end(2 ** (self.word_bits - 1) - 1, shift)
        bottom = top if self.symmetric else self._end(2 ** (self.word_bits - 1), shift)
        found = jnp.minimum(found, jnp.where(x < 0, bottom, top))
        return with_sign(jnp.where(nan, jnp.uint32(NAN), found), x)

    def _end(self, k: int, shift: int | Array) -> Array:
        return bits_of_product(k, self.least + shift) if k else jnp.uint32(0)

    def encode(self, values: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """The codes of values of the format in two's complement, of at most 8 bits."""
        k = (values * 2.0**self.fraction_bits).astype(jnp.int32)
        return (k & (2**self.word_bits - 1)).astype(jnp.uint8)

    def levels(self) -> np.ndarray:
        """The numbers of all codes in their order, float32."""
        k = np.arange(2**self.word_bits)
        k = np.where(k >= 2 ** (self.word_bits - 1), k - 2**self.word_bits, k)
        return (k * 2.0**-self.fraction_bits).astype(np.float32)


@FORMATS.register("fixed")
def fixed(
    word_bits: Count,
    fraction_bits: int,
    overflow: Annotated[str, OneOf("clamp", "wrap")] = "clamp",
    symmetric: bool = False,
) -> Fixed:
    """Fixed point: `k · 2^−fraction_bits`.

    Args:
      word_bits: of k with its sign.
      fraction_bits: bits after the point.
      overflow: clamp or wrap.
      symmetric: leave out the most negative number.
    """
    return Fixed("fixed", word_bits, fraction_bits, overflow, symmetric)
