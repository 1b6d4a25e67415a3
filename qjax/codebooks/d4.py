"""D4, the 2-bit codebook of 256 points in four dimensions (QuIP#, section 4 and table 4; arXiv 2402.04396).

The points are `{x ∈ (Z + ½)⁴ : Σx even, ‖x‖² ≤ 9}`: 32 magnitude vectors with eight choices of signs. A code has eight
bits, `(magnitude index << 3) | signs of coordinates 0, 1, 2`; the last sign makes the coordinate sum even.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8

from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.half_lattice import (
    cheapest,
    descending,
    lexicographic_index,
    magnitude_levels,
    odd,
    ranks,
    search_ball,
)
from qjax.codebooks.vector import VectorCodebook, check_bits, check_rms, nibble_table, nibble_values
from qjax.registry import Positive
from qjax.typing import pytree

__all__ = ["D4", "d4"]

_NIBBLES = (0, 1, 2, 3)


def _table() -> np.ndarray:
    """The 32 magnitude vectors in lexicographic order as words; the last coordinate is negated where the sum is odd."""
    values = np.asarray([s for s in itertools.product((0.5, 1.5, 2.5), repeat=4) if sum(v * v for v in s) <= 9])
    values[:, 3] *= np.where(values.sum(axis=1) % 2 == 1, -1, 1)
    return nibble_table(values, _NIBBLES)


_TABLE = _table()


@pytree
class D4(VectorCodebook):
    """Two bits per weight, tiles of 1×4, uint8 codes."""

    dim = 4

    def quantize(self, x: Float[Array, "m n"]) -> UInt8[Array, "m n//4"]:
        """The nearest codeword, exactly. Raises InputError when n is not a multiple of 4."""
        y = self.split(x)
        size, negative = [jnp.abs(v) for v in y], [v < 0 for v in y]
        _, option = search_ball(descending(size), odd(negative))
        levels = magnitude_levels(option, ranks(size))
        wrong = odd([*negative, sum(levels[1:], levels[0]) & 1 == 1])
        _, first, *_ = cheapest([a * (2 * level + 1).astype(a.dtype) for a, level in zip(size, levels, strict=True)])
        code = lexicographic_index(levels) << 3
        for i in range(3):
            code = code | ((negative[i] ^ (wrong & (first == i))).astype(jnp.int32) << i)
        return code.astype(jnp.uint8)

    def dequantize(self, codes: UInt8[Array, "m groups"]) -> Float[Array, "m groups*4"]:
        """The codewords, from the bits of the codes and one look-up in a table of 32 words."""
        word = codes.astype(jnp.uint32)
        signs = word & np.uint32(7)
        last = (signs ^ (signs >> 1) ^ (signs >> 2)) & np.uint32(1)
        entry = jnp.take(jnp.asarray(_TABLE), (word >> 3).astype(jnp.int32), axis=0, mode="clip")
        values = nibble_values(entry, signs | (last << 3), _NIBBLES)
        return values.reshape(codes.shape[0], codes.shape[1] * self.dim)


@CODEBOOKS.register("d4")
def d4(bits: int | float = 2, rms: Positive | None = None) -> D4:
    """D4 (2 bits): 256 points of D4 + ½. Raises InputError for another bit width.

    Args:
      bits: 2.
      rms: the input RMS; None is 1.21, the Gaussian optimum; QuIP# suggests 1.1 for a whole pipeline.
    """
    return D4("d4", check_bits("d4", bits), check_rms("d4", rms, 1.21))
