"""Floating-point formats of any exponent and mantissa width that fits into float32, subnormals kept.

`e4m3` and `e5m2` are those of OCP's OFP8 1.0 (`float8_e4m3fn` and `float8_e5m2` of ml_dtypes), `e2m1`, `e2m3` and
`e3m2` the elements of OCP's MX 1.0, `e3m4` the one of ml_dtypes, `e8m0` the scale of MX.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.errors import InputError
from qjax.formats.base import FORMATS, NumberFormat
from qjax.formats.rounding import INFINITY, NAN, bits_of_product, magnitude, round_magnitude, with_sign
from qjax.registry import Count, Natural, OneOf

__all__ = ["ExponentOnly", "Float", "e2m1", "e2m3", "e3m2", "e3m4", "e4m3", "e5m2", "make_float"]

Overflow = Annotated[str, OneOf("saturate", "infinity", "nan")]


@dataclasses.dataclass(frozen=True)
class Float(NumberFormat):
    """A floating-point format: sign, exponent with a bias, mantissa, subnormals.

    Attributes:
      name: for messages.
      exponent_bits: 1 to 8.
      mantissa_bits: 0 to 23. With 0 a tie goes to the larger power of two.
      overflow: what becomes of numbers that round to more than the largest, and of infinities: the largest
        ("saturate"), "infinity" or "nan". Towards zero nothing finite overflows.
      specials: "ieee": the largest exponent is kept for infinity and NaN; "nan": the largest code alone is NaN; "none":
        all codes are numbers, as in QPyTorch, and NaN is refused (under jit it stays NaN).
      bias: of the exponent, None for `2^(exponent_bits − 1) − 1`.
    """

    name: str
    exponent_bits: Count
    mantissa_bits: Natural
    overflow: Overflow = "saturate"
    specials: Annotated[str, OneOf("ieee", "nan", "none")] = "ieee"
    bias: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        e, m = self.exponent_bits, self.mantissa_bits
        if e > 8 or m > 23 or (e == 1 and self.specials == "ieee") or (self.specials == "nan" and e == 1 and m == 0):
            raise InputError(
                f"format {self.title!r} has exponent_bits={e}, mantissa_bits={m} and specials={self.specials}; there "
                "are 1 to 8 exponent bits (2 at least with specials=ieee) and 0 to 23 mantissa bits"
            )
        if self.least < -149 or self.largest[1] + m > 127:
            raise InputError(
                f"format {self.title!r} reaches from 2^{self.least} to 2^{self.largest[1] + m}, outside of float32's "
                "2^-149 to 2^127, in which it is simulated; use fewer exponent bits, another bias or specials=ieee"
            )
        missing = {"infinity": self.specials != "ieee", "nan": self.specials == "none"}.get(self.overflow, False)
        if missing:
            raise InputError(
                f"format {self.title!r} has overflow={self.overflow} and specials={self.specials}, which has no code "
                "for it; use overflow=saturate"
            )

    @property
    def offset(self) -> int:
        """The bias of the exponent."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.bias is None else self.bias

    @property
    def least(self) -> int:
        """The exponent of the smallest positive number."""
        return 1 - self.offset - self.mantissa_bits

    @property
    def largest(self) -> tuple[int, int]:
        """(significand, exponent) of the largest finite number, `significand · 2^exponent`."""
        m, field = self.mantissa_bits, 2**self.exponent_bits - 1
        taken = {"ieee": 2**m, "nan": 1, "none": 0}[self.specials]
        field, mantissa = divmod((field << m | (2**m - 1)) - taken, 2**m)
        return 2**m + mantissa, field - self.offset - m

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emax(self) -> int:
        """`floor(log2 ·)` of the largest number."""
        return self.largest[1] + self.mantissa_bits

    @property
    def keeps(self) -> bool:
        """Whether there is a NaN."""
        return self.specials != "none"

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        return self.round_at(x, 0, rounding, words)

    def round_at(
        self, x: Float32[Array, "*shape"], shift: int | Array, rounding: str = "nearest", words: Array | None = None
    ) -> Float32[Array, "*shape"]:
        """x rounded to the values of the format times `2^shift` (broadcastable to x)."""
        bits = magnitude(x)
        found = round_magnitude(bits, self.least + shift, self.mantissa_bits, rounding, words)
        significand, exponent = self.largest
        largest = bits_of_product(significand, exponent + shift)
        over = found > largest
        if self.overflow == "saturate":
            found = jnp.where(over, largest, found)
        else:
            beyond = jnp.uint32(INFINITY if self.overflow == "infinity" else NAN)
            if rounding == "toward_zero":
                found = jnp.where(over, jnp.where(bits == INFINITY, beyond, largest), found)
            else:
                found = jnp.where(over | (bits == INFINITY), beyond, found)
        return with_sign(jnp.where(bits > INFINITY, jnp.uint32(NAN), found), x)

    def encode(self, values: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """The codes (sign, exponent, mantissa) of values of the format, of at most 8 bits."""
        bits, m = magnitude(values), self.mantissa_bits
        normal = (bits >> (23 - m)).astype(jnp.int32) - ((127 - self.offset) << m)
        subnormal = (jnp.abs(values) * 2.0**-self.least).astype(jnp.int32)
        code = jnp.where(bits >= bits_of_product(2**m, self.least), normal, subnormal)
        sign = (jax.lax.bitcast_convert_type(values, jnp.uint32) >> 31).astype(jnp.uint8)
        return code.astype(jnp.uint8) | (sign << (self.bits - 1))

    def levels(self) -> np.ndarray:
        """The numbers of all codes in their order, float32; those of NaN and infinity are NaN and infinity."""
        m, half = self.mantissa_bits, 2 ** (self.bits - 1)
        code = np.arange(half)
        field, mantissa = code >> m, code & (2**m - 1)
        significand = np.where(field > 0, 2**m + mantissa, mantissa).astype(np.float64)
        positive = np.ldexp(significand, np.maximum(field, 1) - self.offset - m)
        beyond = positive > self.largest[0] * 2.0 ** self.largest[1]
        infinite = (mantissa == 0) & (self.specials == "ieee")
        positive = np.where(beyond, np.where(infinite, np.inf, np.nan), positive)
        return np.concatenate([positive, -positive]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ExponentOnly(NumberFormat):
    """E8M0: the powers of two from 2^−127 to 2^127, and NaN, without a sign and without zero (OCP MX 1.0).

    Rounded in value and not in the exponent: nearest of 1.5 is 2. What is not positive becomes NaN, and so does what is
    or rounds to more than 2^127; what is below 2^−127 becomes 2^−127.
    """

    name: str = "e8m0"

    @property
    def bits(self) -> int:
        """The exponent."""
        return 8

    @property
    def keeps(self) -> bool:
        """NaN is the code 255."""
        return True

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        bits = magnitude(x)
        found = jnp.maximum(round_magnitude(bits, -127, 0, rounding, words), jnp.uint32(0x40_0000))
        bad = (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 31 > 0) | (bits == 0) | (found >= INFINITY)
        found = jnp.where(bad | (bits >= INFINITY), jnp.uint32(NAN), found)
        return jax.lax.bitcast_convert_type(found, jnp.float32)


@FORMATS.register("float")
def make_float(
    exponent_bits: Count,
    mantissa_bits: Natural,
    overflow: Overflow = "saturate",
    specials: Annotated[str, OneOf("ieee", "nan", "none")] = "ieee",
    bias: int | None = None,
) -> Float:
    """A floating-point format of one's own.

    Args:
      exponent_bits: 1 to 8.
      mantissa_bits: 0 to 23.
      overflow: saturate, infinity or nan.
      specials: ieee (infinity and NaN at the largest exponent), nan (the largest code alone) or none (QPyTorch's).
      bias: of the exponent, null for the middle.
    """
    return Float("float", exponent_bits, mantissa_bits, overflow, specials, bias)


@FORMATS.register("e4m3")
def e4m3(overflow: Overflow = "saturate") -> Float:
    """OCP's E4M3 (E4M3FN): up to 448, NaN, no infinity."""
    return Float("e4m3", 4, 3, overflow, "nan")


@FORMATS.register("e5m2")
def e5m2(overflow: Overflow = "saturate") -> Float:
    """OCP's E5M2: up to 57,344, infinity and NaN."""
    return Float("e5m2", 5, 2, overflow)


@FORMATS.register("e3m4")
def e3m4(overflow: Overflow = "saturate") -> Float:
    """E3M4: up to 15.5, infinity and NaN."""
    return Float("e3m4", 3, 4, overflow)


@FORMATS.register("e2m1")
def e2m1() -> Float:
    """E2M1, FP4: ±0, ½, 1, 1½, 2, 3, 4, 6."""
    return Float("e2m1", 2, 1, specials="none")


@FORMATS.register("e2m3")
def e2m3() -> Float:
    """E2M3, FP6: up to 7.5 in steps of at least ⅛."""
    return Float("e2m3", 2, 3, specials="none")


@FORMATS.register("e3m2")
def e3m2() -> Float:
    """E3M2, FP6: up to 28 in steps of at least 1/16."""
    return Float("e3m2", 3, 2, specials="none")


@FORMATS.register("e8m0")
def e8m0() -> ExponentOnly:
    """E8M0: powers of two, the scale of MX."""
    return ExponentOnly()


@FORMATS.register("bfloat16")
def bfloat16(overflow: Overflow = "infinity") -> Float:
    """Bfloat16, with its subnormals."""
    return Float("bfloat16", 8, 7, overflow)


@FORMATS.register("float16")
def float16(overflow: Overflow = "infinity") -> Float:
    """IEEE half precision."""
    return Float("float16", 5, 10, overflow)
