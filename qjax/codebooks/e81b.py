"""E81B, the 1-bit codebook of 256 short points of the E8 lattice (QuIP#, appendix F.5; arXiv 2402.04396).

The points are all of E8 with squared norm at most 2 (the origin, 112 `±e_i ± e_j`, 128 of magnitude ½ with an even sum)
and the `±2e_i` but for `−2e_7`. A code has eight bits:

    0 … 127    magnitudes ½; bits 0 … 6 are the signs of coordinates 0 … 6
    128 … 239  `±e_i ± e_j`, i < j: 128 + 4·(place of the pair, lexicographic) + 2·(sign at i) + (sign at j)
    240 … 254  `±2e_i`: 240 + 2i + sign
    255        the origin
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8

from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.half_lattice import cheapest, odd
from qjax.codebooks.vector import VectorCodebook, check_bits, check_rms, nibble_table, nibble_values
from qjax.registry import Positive
from qjax.typing import pytree

__all__ = ["E81B", "e81b", "e81b_points", "e81b_table"]

_NIBBLES = (0, 1, 2, 3, 4, 5, 6, 7)
_PAIRS, _DOUBLES, _ORIGIN = 128, 240, 255


def e81b_points() -> np.ndarray:
    """All codewords in the order of their codes, float32 `[256, 8]`."""
    points = np.zeros((256, 8), np.float32)
    bits = np.arange(128)[:, None] >> np.arange(7) & 1
    signs = np.concatenate([bits, bits.sum(axis=1, keepdims=True) & 1], axis=1)
    points[:_PAIRS] = 0.5 - signs
    for place, (i, j) in enumerate(itertools.combinations(range(8), 2)):
        for signs in range(4):
            points[_PAIRS + 4 * place + signs, [i, j]] = 1 - 2 * (signs >> 1), 1 - 2 * (signs & 1)
    for i in range(8):
        points[_DOUBLES + 2 * i, i], points[_DOUBLES + 2 * i + 1, i] = 2, -2
    points[_ORIGIN] = 0  # instead of −2e_7
    return points


def e81b_table() -> np.ndarray:
    """The codewords as uint32 `[256]`: nibble i is `2·value + 8` of coordinate i."""
    return nibble_table(e81b_points(), _NIBBLES)


_TABLE = e81b_table()


@pytree
class E81B(VectorCodebook):
    """One bit per weight, tiles of 1×8, uint8 codes."""

    dim = 8

    def quantize(self, x: Float[Array, "m n"]) -> UInt8[Array, "m n//8"]:
        """The nearest codeword, exactly: the best of each of the four families by its gain `2⟨x, p⟩ − ‖p‖²`.

        Raises InputError when n is not a multiple of 8.
        """
        y = self.split(x)
        size, negative = [jnp.abs(v) for v in y], [v < 0 for v in y]
        sign = [flag.astype(jnp.int32) for flag in negative]
        low, lowest, *_ = cheapest(size)
        most, i, next_most, j = (cheapest([-a for a in size])[k] for k in range(4))
        # Without −2e_7 the last coordinate may only be doubled upwards.
        doubled, at, *_ = cheapest([*(-a for a in size[:-1]), -y[-1]])

        wrong = odd(negative)
        half_gain = sum(size[1:], size[0]) - jnp.where(wrong, 2 * low, 0) - 2
        half_code = jnp.zeros_like(lowest)
        for k in range(7):
            half_code = half_code | ((negative[k] ^ (wrong & (lowest == k))).astype(jnp.int32) << k)

        pair_gain = -2 * (most + next_most) - 2
        lower, upper = jnp.minimum(i, j), jnp.maximum(i, j)
        place = (lower * (15 - lower) >> 1) + upper - lower - 1
        pair_code = _PAIRS + 4 * place + 2 * _pick(sign, lower) + _pick(sign, upper)

        double_gain = -4 * doubled - 4
        double_code = _DOUBLES + 2 * at + _pick(sign, at)

        gain, code = jnp.zeros_like(half_gain), jnp.full_like(half_code, _ORIGIN)
        for other_gain, other in ((half_gain, half_code), (pair_gain, pair_code), (double_gain, double_code)):
            better = other_gain > gain
            gain, code = jnp.where(better, other_gain, gain), jnp.where(better, other, code)
        return code.astype(jnp.uint8)

    def dequantize(self, codes: UInt8[Array, "m groups"]) -> Float[Array, "m groups*8"]:
        """The codewords, from one look-up in a table of 256 words."""
        entry = jnp.take(jnp.asarray(_TABLE), codes.astype(jnp.int32), axis=0, mode="clip")
        return nibble_values(entry, None, _NIBBLES).reshape(codes.shape[0], codes.shape[1] * self.dim)


def _pick(values: list[Array], at: Array) -> Array:
    """`values[at]` by selection, without a gather."""
    result = values[0]
    for i, value in enumerate(values[1:], start=1):
        result = jnp.where(at == i, value, result)
    return result


@CODEBOOKS.register("e81b")
def e81b(bits: int | float = 1, rms: Positive | None = None) -> E81B:
    """E81B (1 bit): 256 points of E8. Raises InputError for another bit width.

    Args:
      bits: 1.
      rms: the input RMS; None is 0.6, the Gaussian optimum.
    """
    return E81B("e81b", check_bits("e81b", bits), check_rms("e81b", rms, 0.6))
