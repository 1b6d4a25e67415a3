"""Packed codes as values in the fewest instructions of a GPU, without their scale.

A code of b bits at bit p of a word becomes a float by one instruction: with the other bits masked away and the exponent
of 2^(23 − p) in their place the word is the number `2^(23 − p) + code`, and one subtraction leaves the code, exactly.
So no code is shifted to the right but those above the 23 bits of a fraction, which are moved 16 bits down together, and
none is converted. Bytes of a hash are summed by one instruction (see `triton.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.dequant_matmul import tables, trellis
from pallas_kernels.dequant_matmul.layout import ROWS, PackedMatrix
from pallas_kernels.triton import Instructions

__all__ = ["CENTRE", "Decoder", "windows"]

CENTRE = 510
"""The mean of the sum of four random bytes."""

_FRACTION = 23
_EXPONENT = (127 + _FRACTION) << _FRACTION
"""The bits of 2²³."""


def windows(words: Sequence[Array], bits: int, L: int, half: int) -> Callable[[int], Array]:
    """The function from t to the state of weight t of a row of a trellis tile, to be called with 0, 1, … 15.

    `words` are the row's units and the first of the next row, of tile `half` of two.
    """
    kept: dict[int, Array] = {}

    def state(t: int) -> Array:
        unit, start = divmod(t * bits, 16)
        if unit not in kept:
            kept.clear()  # the window of 32 bits that begins at a unit serves all states that begin in it
            first, second = words[unit], words[unit + 1]
            if half:
                kept[unit] = (first & np.uint32(0xFFFF0000)) | (second >> np.uint32(16))
            else:
                kept[unit] = (first << np.uint32(16)) | (second & np.uint32(0xFFFF))
        return (kept[unit] >> np.uint32(32 - start - L)) & np.uint32(2**L - 1)

    return state


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Values of packed codes.

    Attributes:
      ops: instructions by name.
      lookup: for a code with a table, see `tables`.
    """

    ops: Instructions
    lookup: tables.Lookup | None = None

    def code_at(self, words: Array, bit: int, width: int, kept: dict[int, Array]) -> Array:
        """The code of `width` bits at `bit`, float32. `kept` has, and is given, what codes of these words share."""
        shift = 0 if bit + width <= _FRACTION else 16
        bit -= shift
        if shift not in kept:
            kept[shift] = words >> np.uint32(shift) if shift else words
        return self.ops.code(kept[shift], (2**width - 1) << bit, _EXPONENT - (bit << _FRACTION))

    def e8p_terms(self, codes: Array) -> tuple[list[Array], Array]:
        """(a term of each of the eight coordinates, the constant of all): `value = term / 2 + constant`."""
        assert self.lookup is not None
        nibbles, constant = tables.e8p_nibbles(codes, self.lookup)
        kept: dict[int, Array] = {}
        return [self.code_at(nibbles, 4 * nibble, 4, kept) for nibble in tables.NIBBLES], constant

    def trellis_value(self, code: str, state: Array, centred: bool = False) -> Array:
        """The value of states over `trellis.unit(code)`, float32, exactly `trellis.half_values`.

        With `centred`, of mul1 alone, the sum of bytes less CENTRE, of which its value is a linear function.
        """
        word = trellis.hashed(code, state)
        if code == "1mad" or centred:
            total = self.ops.byte_sum(word, _EXPONENT)
            return jax.lax.bitcast_convert_type(total, jnp.float32) - np.float32(2.0**_FRACTION + CENTRE)
        if code == "mul1":  # 0x6400 + n is float16's 1024 + n
            return self.ops.half_multiply_add(self.ops.byte_sum(word, 0x6400), *trellis.MUL1_BITS)
        return self.ops.half_sum(word, trellis.KEPT_3INST, trellis.FLIPPED_3INST)

    def slabs(self, words: Sequence[Array], weight: PackedMatrix, centred: bool = False) -> Callable[[int], Array]:
        """The function from a slab of a code that is no scalar grid to its values, to be called with 0, 1, … 31.

        `words` are a block's pieces and, of a trellis, the next row's first one. Of a computed code the values are over
        `trellis.unit`, or `centred`: see `trellis_value`.
        """
        if weight.code in tables.LATTICES:
            return self._lattice(words, weight)
        if weight.table is not None:
            assert self.lookup is not None
            return tables.decoder(words[: weight.bits], words[-1], weight, self.lookup)
        code = weight.code
        assert code is not None
        state = [windows(words, weight.bits, weight.L, half) for half in (0, 1)]
        return lambda j: self.trellis_value(code, state[j // ROWS](j % ROWS), centred)

    def _lattice(self, words: Sequence[Array], weight: PackedMatrix) -> Callable[[int], Array]:
        kept: dict[int, tuple[list[Array], list[Array], Array]] = {}

        def stages(q: int) -> tuple[list[Array], list[Array], Array]:
            """(terms of the eight coordinates, those of the second stage, the constant of all)."""
            first, constant = self.e8p_terms(words[q // 2] >> np.uint32(16 * (q % 2)))
            factor = np.float32(weight.residual)
            if weight.bits == 4:
                second, other = self.e8p_terms(words[2 + q // 2] >> np.uint32(16 * (q % 2)))
                return first, second, self.ops.multiply_add(other, jnp.full(other.shape, factor), constant)
            if weight.bits == 3:
                assert self.lookup is not None
                byte = (words[2] >> np.uint32(8 * q)) & np.uint32(255)
                entry, own = self.lookup(tables.ENTRIES, tables.ENTRIES, byte), {}
                second = [self.code_at(entry, 4 * i, 4, own) for i in range(8)]
                return first, second, constant - np.float32(4) * factor
            return first, [], constant

        def coordinate(j: int) -> Array:
            q, i = divmod(j, 8)
            if q not in kept:
                kept.clear()
                kept[q] = stages(q)
            first, second, constant = kept[q]
            if second:
                constant = self.ops.multiply_add(second[i], jnp.full(second[i].shape, 0.5 * weight.residual), constant)
            return self.ops.multiply_add(first[i], jnp.full(first[i].shape, 0.5, jnp.float32), constant)

        return coordinate
