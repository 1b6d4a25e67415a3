"""Formats of a few tabled levels with a float32 scale per block: NF4 and FP4 of bitsandbytes, and ternary numbers.

Sources: NF4: QLoRA (2305.14314), appendix E; FP4: bitsandbytes' own, whose values are not those of E2M1; ternary:
BitNet b1.58 (2402.17764), equations 1 to 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.errors import InputError
from qjax.formats.base import FORMATS, NumberFormat, blocked, padded_size, unblocked
from qjax.registry import Count, OneOf

__all__ = ["FP4", "NF4", "Levels", "Table", "fp4", "nf4", "ternary"]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_POSITIVE = (0.0, 0.0052083333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
FP4 = (*(-value for value in reversed(_POSITIVE[1:])), *_POSITIVE)


@dataclasses.dataclass(frozen=True)
class Levels:
    """Ascending levels, stored as their number.

    Attributes:
      values: float32 numbers.
      bits: of a code.
    """

    values: tuple[float, ...]
    bits: int

    def levels(self) -> np.ndarray:
        """The number of every code, float32; of codes that are not used the last one."""
        table = np.asarray(self.values, np.float32)
        return np.pad(table, (0, 2**self.bits - len(table)), mode="edge")

    def edges(self) -> np.ndarray:
        """Midpoints of neighbours, float32."""
        table = np.asarray(self.values, np.float32)
        return (table[1:] + table[:-1]) / np.float32(2)

    def code(self, x: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
        """The number of the nearest level, the lower one of two that are equally near."""
        found = jnp.zeros(x.shape, jnp.uint8)
        for edge in self.edges():
            found = found + (x > edge).astype(jnp.uint8)
        return found

    def chosen(self, x: Float32[Array, "*shape"], rounding: str, words: Array | None) -> Float32[Array, "*shape"]:
        """x rounded to a level; beyond the outermost ones to them."""
        table = jnp.asarray(self.levels())
        if rounding.startswith("nearest"):
            return table[self.code(x).astype(jnp.int32)]
        last = len(self.values) - 2
        below = jnp.zeros(x.shape, jnp.int32)
        for level in self.values[1:-1]:
            below = below + (x >= np.float32(level)).astype(jnp.int32)
        low, high = table[below], table[jnp.minimum(below, last) + 1]
        share = jnp.clip((x - low) / (high - low), 0, 1)
        if rounding == "stochastic":
            assert words is not None
            # Of [0, 2^24) at most: a share has 24 bits, and 2^24 must stand above every word.
            up = (words >> 8) < (share * 2.0**24).astype(jnp.uint32)
        else:
            up = jnp.where(x < 0, share > 0, share >= 1)
        return jnp.where(up, high, low)


@dataclasses.dataclass(frozen=True)
class Table(NumberFormat):
    """Levels times a float32 scale per block: its largest magnitude, or its mean one.

    The scale is bitsandbytes' or BitNet's; a block of zeros has the scale 1. Ties go to the lower level in all of the
    roundings "nearest…"; the probabilities of "stochastic" are exact to 2^−24 of the distance of two levels.

    Attributes:
      name: for messages.
      element: the levels.
      block: what has one scale: the "tensor", every "row", or so many values of the last axis, the last block of which
        may be shorter.
      scale: "absmax" or "absmean".
    """

    name: str
    element: Levels
    block: Annotated[str, OneOf("tensor", "row")] | Count = 64
    scale: Annotated[str, OneOf("absmax", "absmean")] = "absmax"

    @property
    def bits(self) -> float:
        """Of a code, with the 32 of a block's scale where its size is known."""
        return self.element.bits + (32 / self.block if isinstance(self.block, int) else 0)

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Codes and scales of an array, with the padding of the last axis."""
        rows, last = math.prod(shape[:-1]), shape[-1]
        if isinstance(self.block, int):
            padded = padded_size(last, self.block)
            return rows * (padded * self.element.bits + padded // self.block * 32)
        return rows * last * self.element.bits + 32 * (1 if self.block == "tensor" else rows)

    def scales(self, blocks: Float32[Array, "*blocks values"], count: int | Array) -> Float32[Array, "*blocks"]:
        """The scale of blocks on the last axis, of which `count` values are no padding."""
        size = jnp.abs(blocks)
        found = (
            jnp.max(size, axis=-1)
            if self.scale == "absmax"
            else jnp.sum(size, axis=-1) / jnp.broadcast_to(jnp.float32(count), size.shape[:-1])
        )
        return jnp.where(found == 0, 1.0, found)

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        if isinstance(self.block, int):
            width, parts = self.block, blocked(x, self.block)
            chance = None if words is None else blocked(words, self.block)
        else:
            width = x.size if self.block == "tensor" else x.shape[-1]
            parts = x.reshape(1, -1) if self.block == "tensor" else x
            chance = None if words is None else words.reshape(parts.shape)
        scale = self.scales(parts, self._counts(x.shape[-1], width))[..., None]
        values = self.element.chosen(parts / scale, rounding, chance) * scale
        values = jnp.where(jnp.isfinite(scale), values, jnp.nan)
        return unblocked(values, x.shape[-1]) if isinstance(self.block, int) else values.reshape(x.shape)

    def _counts(self, size: int, width: int) -> int | Array:
        """Values of every block that are no padding."""
        if not isinstance(self.block, int) or size % width == 0:
            return width
        starts = np.arange(0, size, width)
        return jnp.asarray(np.minimum(size - starts, width), jnp.float32)


def _absmax(name: str, levels: tuple[float, ...], block: int) -> Table:
    if block < 2:
        raise InputError(f"format {name!r} has block={block}; a scale per value would hold the value itself: use 64")
    return Table(name, Levels(levels, 4), block)


@FORMATS.register("nf4")
def nf4(block: Count = 64) -> Table:
    """NF4: 16 quantiles of a normal distribution, 4.5 bits with a float32 scale per 64 values."""
    return _absmax("nf4", NF4, block)


@FORMATS.register("fp4")
def fp4(block: Count = 64) -> Table:
    """FP4 of bitsandbytes: ±0, 1/192, ⅙, ¼, ⅓, ½, ⅔, 1 of the largest magnitude; 15 levels, no E2M1."""
    return _absmax("fp4", FP4, block)


@FORMATS.register("ternary")
def ternary(
    block: Annotated[str, OneOf("tensor", "row")] | Count = "tensor",
    scale: Annotated[str, OneOf("absmax", "absmean")] = "absmean",
) -> Table:
    """−1, 0 and 1 times a scale, by default the mean magnitude (BitNet b1.58), in 2 bits."""
    return Table("ternary", Levels((-1.0, 0.0, 1.0), 2), block, scale)
