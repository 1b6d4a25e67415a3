"""Block floating point: integers with a shared exponent per tensor, row, column or block."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import InputError
from qjax.formats.base import FORMATS, NumberFormat, blocked, padded_size, unblocked
from qjax.formats.fixed import Fixed
from qjax.formats.rounding import INFINITY, floor_log2, magnitude
from qjax.registry import Count, OneOf

__all__ = ["BlockFloat", "block_float"]

Shared = Annotated[str, OneOf("tensor", "row", "column")] | Count


@dataclasses.dataclass(frozen=True)
class BlockFloat(NumberFormat):
    """`k · 2^(E + 2 − word_bits)` with `E = floor(log2 max|block|)` and |k| < 2^(word_bits − 1), as in QPyTorch.

    The exponent takes 8 bits, −126 to 127; where all is smaller it is −126.

    Attributes:
      name: for messages.
      word_bits: of k with its sign, 2 to 24.
      block: what shares an exponent: the "tensor", every "row" (last axis), every "column" (all axes but the last), or
        so many values of the last axis, the last block of which may be shorter.
    """

    name: str
    word_bits: Count
    block: Shared = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.word_bits <= 24:
            raise InputError(f"format {self.title!r} has bits={self.word_bits}; there are 2 to 24 with the sign")

    @property
    def bits(self) -> float:
        """`word_bits`, with the exponent of a block where its size is known."""
        return self.word_bits + (8 / self.block if isinstance(self.block, int) else 0)

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Words and exponents of an array."""
        count, last = math.prod(shape), shape[-1] if shape else 1
        rows = count // max(last, 1)
        if isinstance(self.block, int):
            padded = padded_size(last, self.block)
            return rows * (padded * self.word_bits + padded // self.block * 8)
        return count * self.word_bits + 8 * {"tensor": 1, "row": rows, "column": last}[self.block]

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        if isinstance(self.block, int):
            parts = blocked(x, self.block)
            words = None if words is None else blocked(words, self.block)
            return unblocked(self._shared(parts, (-1,), rounding, words), x.shape[-1])
        every = tuple(range(x.ndim))
        return self._shared(x, {"tensor": every, "row": every[-1:], "column": every[:-1]}[self.block], rounding, words)

    def _shared(self, x: Array, axes: tuple[int, ...], rounding: str, words: Array | None) -> Array:
        top = jnp.max(magnitude(x), axis=axes, keepdims=True, initial=jnp.uint32(0))
        exponent = jnp.clip(floor_log2(top), -126, 127)
        element = Fixed(self.name, self.word_bits, self.word_bits - 2, symmetric=True)
        return jnp.where(top >= INFINITY, jnp.nan, element.round_at(x, exponent, rounding, words))


@FORMATS.register("block_float")
def block_float(bits: Count, block: Shared = "tensor") -> BlockFloat:
    """Integers with a shared exponent.

    Args:
      bits: of a value with its sign, without the exponent.
      block: tensor, row, column, or a number of values of the last axis.
    """
    return BlockFloat("block_float", bits, block)
