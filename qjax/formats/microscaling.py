"""Microscaling (OCP MX 1.0): blocks of 32 small numbers with a power of two as their scale, in one byte (E8M0)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

from qjax.formats.base import FORMATS, NumberFormat, blocked, padded_size, unblocked
from qjax.formats.fixed import Fixed
from qjax.formats.floats import Float
from qjax.formats.rounding import INFINITY, floor_log2, magnitude
from qjax.registry import Count, OneOf

__all__ = ["Microscaling", "ScaleRuleName", "mxfp4", "mxint8"]

ScaleRuleName = Annotated[str, OneOf("floor", "even", "ceil", "mse")]


@dataclasses.dataclass(frozen=True)
class Microscaling(NumberFormat):
    """Elements times `2^s` per block: `s = floor(log2 max|block|) − emax` by OCP's rule, elements saturate.

    Attributes:
      name: for messages.
      element: Float or Fixed.
      block: values of the last axis with one scale; a shorter last block is filled up with zeros, which are counted.
      scale_rule: "floor" is OCP's; "even" first rounds the largest magnitude to the element's mantissa (halves up);
        "ceil" takes the least s for which nothing saturates; "mse" the one of floor − 1, floor and floor + 1 with the
        least squared error of nearest rounding (the smallest where equal).
    """

    name: str
    element: Float | Fixed
    block: Count = 32
    scale_rule: ScaleRuleName = "floor"

    @property
    def bits(self) -> float:
        """The element's and 8 per block."""
        return self.element.bits + 8 / self.block

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Elements and scales of an array, with the padding of the last axis."""
        padded = padded_size(shape[-1], self.block)
        return math.prod(shape[:-1]) * (padded * self.element.bits + padded // self.block * 8)

    def exponents(self, blocks: Float32[Array, "*blocks values"]) -> Int32[Array, "*blocks"]:
        """s of blocks on the last axis, −127 to 127; −127 of zeros; 128 where a value is not finite."""
        bits = jnp.max(magnitude(blocks), axis=-1)
        floor = floor_log2(bits) - self.element.emax
        if self.scale_rule == "even":
            found = floor_log2(bits + (1 << (22 - self.element.mantissa_bits))) - self.element.emax
        elif self.scale_rule == "ceil":
            significand, _ = self.element.largest
            fraction = (significand << (24 - significand.bit_length())) - 2**23
            found = floor + ((bits & 0x7F_FFFF) > fraction).astype(jnp.int32)
        elif self.scale_rule == "mse":
            found = self._least_error(blocks, floor)
        else:
            found = floor
        return jnp.where(bits >= INFINITY, 128, jnp.where(bits > 0, jnp.clip(found, -127, 127), -127))

    def _least_error(self, blocks: Array, floor: Array) -> Array:
        unit = jnp.exp2(-jnp.clip(floor, -126, 126).astype(jnp.float32))[..., None]

        def error(s: Array) -> Array:
            values = self.element.round_at(blocks, jnp.clip(s, -127, 127)[..., None])
            return jnp.sum(jnp.square((values - blocks) * unit), axis=-1)

        candidates = [floor - 1, floor, floor + 1]
        best = jnp.argmin(jnp.stack([error(s) for s in candidates]), axis=0)
        return floor - 1 + best.astype(jnp.int32)

    def scale_codes(self, x: Float32[Array, "*shape values"]) -> UInt8[Array, "*shape blocks"]:
        """The byte of every block: s + 127, and 255 for NaN."""
        return (self.exponents(blocked(x, self.block)) + 127).astype(jnp.uint8)

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        parts = blocked(x, self.block)
        s = self.exponents(parts)[..., None]
        values = self.element.round_at(
            parts, jnp.minimum(s, 127), rounding, None if words is None else blocked(words, self.block)
        )
        return unblocked(jnp.where(s > 127, jnp.nan, values), x.shape[-1])

    @property
    def scale_bits(self) -> int:
        """Of a block's scale."""
        return 8


@FORMATS.register("mxfp4")
def mxfp4(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXFP4: E2M1, 4.25 bits."""
    return Microscaling("mxfp4", Float("e2m1", 2, 1, specials="none"), block, scale_rule)


@FORMATS.register("mxfp6_e2m3")
def mxfp6_e2m3(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXFP6 with E2M3, 6.25 bits."""
    return Microscaling("mxfp6_e2m3", Float("e2m3", 2, 3, specials="none"), block, scale_rule)


@FORMATS.register("mxfp6_e3m2")
def mxfp6_e3m2(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXFP6 with E3M2, 6.25 bits."""
    return Microscaling("mxfp6_e3m2", Float("e3m2", 3, 2, specials="none"), block, scale_rule)


@FORMATS.register("mxfp8_e4m3")
def mxfp8_e4m3(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXFP8 with E4M3, 8.25 bits."""
    return Microscaling("mxfp8_e4m3", Float("e4m3", 4, 3, specials="nan"), block, scale_rule)


@FORMATS.register("mxfp8_e5m2")
def mxfp8_e5m2(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXFP8 with E5M2, 8.25 bits."""
    return Microscaling("mxfp8_e5m2", Float("e5m2", 5, 2), block, scale_rule)


@FORMATS.register("mxint8")
def mxint8(scale_rule: ScaleRuleName = "floor", block: Count = 32) -> Microscaling:
    """MXINT8: `k / 64`, 8.25 bits; −2 is not used, so that the range is symmetric."""
    return Microscaling("mxint8", Fixed("int8", 8, 6, symmetric=True), block, scale_rule)
