"""E8P12, the 2-bit codebook of QuIP#: 65,536 points of `E8 + ¼` in eight dimensions (arXiv 2402.04396, section 4.2).

A codeword is `signs · magnitudes ± ¼`: 256 magnitude vectors, seven free signs (an even coordinate sum before the shift
decides the eighth) and one shift. A code has 16 bits, `(magnitude index << 8) | b`:

* coordinate i owns bit `(0, 4, 1, 5, 2, 6, 3, 7)[i]` of b, and the same nibble of its table entry;
* the parity p of b is the shift, −¼ for 1 and +¼ for 0; the sign bits are `b XOR p`, of even weight;
* a table entry has its last coordinate negated where its coordinate sum is odd, so that an even number of flips keeps
  the point in the lattice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt16

from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.half_lattice import (
    BALL,
    cheapest,
    count_magnitudes,
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

__all__ = ["E8P", "MAX_CANDIDATES", "NIBBLES", "TABLE_VERSION", "e8p", "e8p_magnitudes", "e8p_table"]

TABLE_VERSION = 1
"""Version of the table and of the code layout, as published checkpoints state it (`codebook_version`)."""

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The bit of the sign byte, and the nibble of the table entry, that coordinate i owns."""

MAX_CANDIDATES = 4 * (len(BALL) + 1)
"""The most codewords near a tile that `E8P.candidates` can rank."""

# The three coordinates of magnitude ½ in each of the 29 magnitude vectors of squared norm 12, in table order; the other
# five are 3/2. Any 29 of the 56 would do as well: these are those of published checkpoints.
_OUTER_TRIPLES = (
    (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (3, 6, 7), (3, 5, 7), (3, 4, 7), (3, 5, 6), (3, 4, 6), (3, 4, 5),
    (2, 6, 7), (2, 5, 7), (2, 4, 7), (2, 5, 6), (2, 4, 6), (2, 4, 5), (1, 6, 7), (1, 5, 7), (1, 4, 7), (1, 5, 6),
    (1, 4, 6), (0, 4, 5), (0, 6, 7), (0, 5, 7), (0, 4, 7), (0, 5, 6), (0, 4, 6), (0, 1, 4), (2, 3, 7),
)  # fmt: skip
_BALL_SIZE = count_magnitudes(8)
_SHIFTS = (0.25, -0.25)


def e8p_magnitudes() -> np.ndarray:
    """The magnitude vectors, float32 `[256, 8]`: 227 with norm² ≤ 10 in lexicographic order, then 29 of norm² 12."""
    ball = [s for s in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in s) <= 10]
    outer = [tuple(0.5 if i in triple else 1.5 for i in range(8)) for triple in _OUTER_TRIPLES]
    return np.asarray(ball + outer, np.float32)


def e8p_table() -> np.ndarray:
    """The magnitudes as uint32 `[256]`: nibble `NIBBLES[i]` is `2·value + 8`, coordinate 7 negated for an odd sum."""
    values = e8p_magnitudes()
    values[:, 7] *= np.where(values.sum(axis=1) % 2 == 1, -1, 1)
    return nibble_table(values, NIBBLES)


_TABLE = e8p_table()


@pytree
class E8P(VectorCodebook):
    """Two bits per weight, tiles of 1×8, uint16 codes; RMS of the codewords 1.09375."""

    dim = 8

    def quantize(self, x: Float[Array, "m n"]) -> UInt16[Array, "m n//8"]:
        """The nearest of all 65,536 codewords, exactly; of equally near ones always the same.

        Raises InputError when n is not a multiple of 8.
        """
        coordinates = self.split(x)

        def search(_: None, shift: Array) -> tuple[None, Array]:
            return None, _nearest_option([v - shift.astype(v.dtype) for v in coordinates])

        def improve(best: tuple[Array, Array], step: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            shift, option = step
            y = [v - shift.astype(v.dtype) for v in coordinates]
            levels, negative = _resolve(y, option)
            code, distance = _encode(option, levels, negative, shift < 0), _distance(y, levels, negative)
            closer = distance < best[0]
            return (jnp.where(closer, distance, best[0]), jnp.where(closer, code, best[1])), None

        # Loops, because what comes out of one lies in memory: otherwise XLA computes the whole search anew for every
        # coordinate of what decodes these codes, thirty times slower on a CPU, where optimization_barrier is gone.
        shifts = jnp.asarray(_SHIFTS, jnp.float32)
        options = lax.scan(search, None, shifts)[1]
        nothing = jnp.full_like(coordinates[0], jnp.inf), jnp.zeros(coordinates[0].shape, jnp.uint16)
        return lax.scan(improve, nothing, (shifts, options))[0][1]

    def dequantize(self, codes: UInt16[Array, "m groups"]) -> Float[Array, "m groups*8"]:
        """The codewords, from the bits of the codes and one look-up in a table of 256 words."""
        word = codes.astype(jnp.uint32)
        parity = lax.population_count(word & np.uint32(255)) & np.uint32(1)
        entry = jnp.take(jnp.asarray(_TABLE), (word >> 8).astype(jnp.int32), axis=0, mode="clip")
        shift = np.float32(0.25) - parity.astype(jnp.float32) * np.float32(0.5)
        # Only bit 0 of the sign byte can differ from the effective signs, so one XOR with the parity suffices.
        values = nibble_values(entry, word ^ parity, NIBBLES) + shift[..., None]
        return values.reshape(codes.shape[0], codes.shape[1] * self.dim)

    def candidates(self, x: Float[Array, "m n"], count: int) -> UInt16[Array, "count m n//8"]:
        """Codes of `count` ≤ `MAX_CANDIDATES` codewords near every tile, nearest first.

        They are the best two choices of signs for the best magnitudes of every shape and shift. The first is the
        nearest codeword; the next are not always the next nearest of all 65,536, but little farther away (the first
        four by 2.4% of the mean squared distance of a Gaussian). Memory is that of `MAX_CANDIDATES` codes and distances
        per tile. Raises InputError when n is not a multiple of 8.
        """
        coordinates = self.split(x)

        def choose(_: None, step: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
            shape, minus, second = step
            y = [v - jnp.where(minus, _SHIFTS[1], _SHIFTS[0]).astype(v.dtype) for v in coordinates]
            size = [jnp.abs(v) for v in y]
            outer = _search_outer(size, descending(size)[-1], odd([v < 0 for v in y]))[1]
            option = jnp.where(shape < 0, outer, shape)
            levels, negative = _resolve(y, option, second)
            return None, (_distance(y, levels, negative), _encode(option, levels, negative, minus))

        def rank(best: list[tuple[Array, Array]], new: tuple[Array, Array]) -> tuple[list[tuple[Array, Array]], None]:
            return _insert(best, new), None

        # Two loops: inside one, XLA would compute the distance and the code anew for each of the 2·count outputs.
        shape, minus, second = np.meshgrid([*BALL, -1], [False, True], [False, True], indexing="ij")
        steps = (
            jnp.asarray(shape.reshape(-1), jnp.int32),
            jnp.asarray(minus.reshape(-1)),
            jnp.asarray(second.reshape(-1)),
        )
        found = lax.scan(choose, None, steps)[1]
        nothing = jnp.full_like(coordinates[0], jnp.inf), jnp.zeros(coordinates[0].shape, jnp.uint16)
        best, _ = lax.scan(rank, [nothing] * count, found)
        return jnp.stack([code for _, code in best])


def _distance(y: Sequence[Array], levels: Sequence[Array], negative: Sequence[Array]) -> Array:
    """Squared distance between y and the point with these magnitudes and signs."""
    total = jnp.zeros_like(y[0])
    for value, level, sign in zip(y, levels, negative, strict=True):
        magnitude = level.astype(value.dtype) + 0.5
        total = total + jnp.square(value - jnp.where(sign, -magnitude, magnitude))
    return total


def _insert(best: list[tuple[Array, Array]], new: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """A list of (distance, code), nearest first, with a new entry put in its place and the last one dropped."""
    out = []
    for held in best:
        closer = new[0] < held[0]
        out.append((jnp.where(closer, new[0], held[0]), jnp.where(closer, new[1], held[1])))
        new = jnp.where(closer, held[0], new[0]), jnp.where(closer, held[1], new[1])
    return out


def _search_outer(size: Sequence[Array], low: Array, negative: Array) -> tuple[Array, Array]:
    """The best of the 29 magnitude vectors of norm² 12: (gain as in `search_ball`, table index << 8 | halves).

    Bit i of `halves` says that coordinate i is ½. Five 3/2 are an odd number, so an even number of minus signs costs a
    flip: `2a` at a ½ or `6a` at a 3/2. Where the smallest `a` of all is at a ½, its `2a` is the lowest of all anyway.
    """
    total = sum(size[1:], size[0])
    best = jnp.full_like(low, -jnp.inf)
    option = jnp.full(low.shape, _outer_option(0), jnp.int32)
    for place, (i, j, k) in enumerate(_OUTER_TRIPLES):
        flip = jnp.minimum(2 * jnp.minimum(jnp.minimum(size[i], size[j]), size[k]), 6 * low)
        gain = 2 * (total - (size[i] + size[j] + size[k])) - 10 - jnp.where(negative, 0, flip)
        better = gain > best
        best, option = jnp.where(better, gain, best), jnp.where(better, _outer_option(place), option)
    return best, option


def _outer_option(place: int) -> int:
    return (_BALL_SIZE + place) << 8 | sum(1 << i for i in _OUTER_TRIPLES[place])


def _nearest_option(y: Sequence[Array]) -> Array:
    """The best magnitudes for one shift, as a shape of the ball or an outer option."""
    size = [jnp.abs(v) for v in y]
    ordered, negative = descending(size), odd([v < 0 for v in y])
    gain, option = search_ball(ordered, negative)
    outer_gain, outer = _search_outer(size, ordered[-1], negative)
    return jnp.where(outer_gain > gain, outer, option)


def _resolve(y: Sequence[Array], option: Array, second: Array | bool = False) -> tuple[list[Array], list[Array]]:
    """(levels 0, 1, 2 for ½, 3/2, 5/2; whether negative) of the nearest point with the magnitudes of `option`.

    With `second` the next nearest point of these magnitudes, as far as it differs in the two cheapest signs.
    """
    size = [jnp.abs(v) for v in y]
    inner = magnitude_levels(option, ranks(size))
    levels = [jnp.where(option > 255, 1 - (option >> i & 1), level) for i, level in enumerate(inner)]
    negative = [v < 0 for v in y]
    wrong = odd([*negative, sum(levels[1:], levels[0]) & 1 == 1])
    costs = [a * (2 * level + 1).astype(a.dtype) for a, level in zip(size, levels, strict=True)]
    _, first, _, other = cheapest(costs)
    signs = []
    for i, sign in enumerate(negative):
        signs.append(sign ^ ((wrong ^ second) & (first == i)) ^ (second & (other == i)))
    return levels, signs


def _encode(option: Array, levels: Sequence[Array], negative: Sequence[Array], minus: Array) -> Array:
    """The 16-bit code of a point: table index above, sign bits and the shift's parity below."""
    index = jnp.where(option > 255, option >> 8, lexicographic_index(levels))
    odd_sum = sum(levels[1:], levels[0]) & 1 == 1
    signs = [*negative[:-1], negative[-1] ^ odd_sum]
    byte = minus.astype(jnp.int32)
    for sign, place in zip(signs, NIBBLES, strict=True):
        byte = byte ^ (sign.astype(jnp.int32) << place)
    return (index << 8 | byte).astype(jnp.uint16)


@CODEBOOKS.register("e8p")
def e8p(bits: int | float = 2, rms: Positive | None = None) -> E8P:
    """E8P12 (2 bits), the lattice codebook of QuIP#. Raises InputError for another bit width.

    Args:
      bits: 2.
      rms: the input RMS; None is 1.03, the Gaussian optimum; QuIP# suggests 0.9 for a whole pipeline.
    """
    return E8P("e8p", check_bits("e8p", bits), check_rms("e8p", rms, 1.03))
