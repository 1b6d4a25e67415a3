"""Codes with a table in the slabs of the kernels: HYB (trellis), E8P and residual E8P (lattices).

Tables are rows of 128 words, for a TPU finds an entry only among the 128 lanes of a register. How a kernel looks one up
is its own affair, `lookup(first, count, index)`: entry `first + index`, index < count, of the table seen as one row.

* HYB's table has 2^Q entries of V float32 values, all first values before all second ones, as bits.
* E8P's has 256 words of eight nibbles `2·value + 8`, whose order is that of the published layout; the table of a 3-bit
  residual (E81B) has 256 words with nibble i for coordinate i.

A lattice code holds 8 consecutive inputs. Row r of a block's pieces has the codes of inputs 32 r … 32 r + 31: code q in
half q mod 2 of piece q // 2, the 8-bit codes of a 3-bit residual in byte q of piece 2, the 16-bit ones of a 4-bit
residual in pieces 2 and 3. So slab 8 q + i is coordinate i of code q, inputs 32 r + 8 q + i, as permuted as a trellis'.

Source: QTIP (2406.11235), section 3.1; QuIP# (2402.04396), sections 4.2 and F.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from pallas_kernels.dequant_matmul.layout import (
    BLOCK,
    LANES,
    ROWS,
    PackedMatrix,
    arranged,
    check_scales,
    unpack_stream,
)
from pallas_kernels.dispatch import KernelError

__all__ = [
    "LATTICES",
    "NIBBLES",
    "TRELLISES",
    "decoder",
    "e8p_nibbles",
    "e8p_values",
    "hyb_values",
    "repack_lattice",
    "table_lines",
]

TRELLISES = ("hyb",)
LATTICES = ("e8p", "e8p_rvq")
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of an entry, and the bit of the sign byte, that coordinate i owns."""
ENTRIES = 256

Lookup = Callable[[int, int, Array], Array]
"""(first entry, how many there are, index) -> entries."""


def hyb_values(states: Array, entries: int, values: int, lookup: Lookup) -> list[Array]:
    """The V float32 values of a state: entry `(h >> (15 − Q)) mod 2^Q`, `h = s (s + 1)`; bit 15 negates the first."""
    h = states * (states + np.uint32(1))
    index = (h >> np.uint32(15 - (entries.bit_length() - 1))) & np.uint32(entries - 1)
    bits = [lookup(v * entries, entries, index) for v in range(values)]
    bits[0] = bits[0] ^ ((h << np.uint32(16)) & np.uint32(0x80000000))
    return [jax.lax.bitcast_convert_type(b, jnp.float32) for b in bits]


def _spread(byte: Array) -> Array:
    """Bit i of a byte as bit 4 i."""
    byte = (byte | (byte << np.uint32(12))) & np.uint32(0x000F000F)
    byte = (byte | (byte << np.uint32(6))) & np.uint32(0x03030303)
    return (byte | (byte << np.uint32(3))) & np.uint32(0x11111111)


def e8p_nibbles(codes: Array, lookup: Lookup) -> tuple[Array, Array]:
    """(signed nibbles, the constant `shift − 4` of all eight) of 16-bit codes; higher bits of a code are ignored."""
    byte = codes & np.uint32(255)
    parity = byte ^ (byte >> np.uint32(4))
    parity = parity ^ (parity >> np.uint32(2))
    parity = (parity ^ (parity >> np.uint32(1))) & np.uint32(1)
    entry = lookup(0, ENTRIES, (codes >> np.uint32(8)) & np.uint32(255))
    # an odd nibble 8 + 2 v becomes 8 − 2 v when its upper three bits are inverted
    nibbles = entry ^ (_spread(byte ^ parity) * np.uint32(14))
    return nibbles, np.float32(-3.75) - parity.astype(jnp.int32).astype(jnp.float32) * np.float32(0.5)


def _nibble(nibbles: Array, place: int) -> Array:
    return ((nibbles >> np.uint32(4 * place)) & np.uint32(15)).astype(jnp.int32).astype(jnp.float32) * np.float32(0.5)


def e8p_values(codes: Array, lookup: Lookup) -> list[Array]:
    """The eight coordinates of 16-bit codes in the low half of words, float32."""
    nibbles, constant = e8p_nibbles(codes, lookup)
    return [_nibble(nibbles, place) + constant for place in NIBBLES]


def decoder(
    parts: Sequence[Array], following: Array | None, weight: PackedMatrix, lookup: Lookup
) -> Callable[[int], Array]:
    """The function from a slab to its values, float32 `[16, lanes]`, to be called with 0, 1, … 31.

    What slabs share, the entry of a state or a code, is computed for the first of them and kept until the next.
    """
    kept: dict[int, list[Array]] = {}

    def hyb(j: int) -> Array:
        half, t = divmod(j, ROWS)
        values = weight.V
        key = (j // values) * values
        if key not in kept:
            kept.clear()
            states = window(parts, following, weight.bits, half, t // values * values * weight.bits, weight.L)
            kept[key] = hyb_values(states, weight.entries, values, lookup)
        return kept[key][t % values]

    def lattice(j: int) -> Array:
        q, i = divmod(j, 8)
        if q not in kept:
            kept.clear()
            kept[q] = list(e8p_nibbles(parts[q // 2] >> np.uint32(16 * (q % 2)), lookup))
            if weight.bits == 3:
                code = (parts[2] >> np.uint32(8 * q)) & np.uint32(255)
                kept[q].append(lookup(ENTRIES, ENTRIES, code))
            if weight.bits == 4:
                kept[q] += e8p_nibbles(parts[2 + q // 2] >> np.uint32(16 * (q % 2)), lookup)
        nibbles, constant, *residual = kept[q]
        value = _nibble(nibbles, NIBBLES[i]) + constant
        if weight.bits == 3:
            return value + (_nibble(residual[0], i) - np.float32(4)) * np.float32(weight.residual)
        if weight.bits == 4:
            return value + (_nibble(residual[0], NIBBLES[i]) + residual[1]) * np.float32(weight.residual)
        return value

    return hyb if weight.code in TRELLISES else lattice


def window(parts: Sequence[Array], following: Array | None, bits: int, half: int, bit: int, L: int) -> Array:
    """The L-bit window from bit `bit` of a row of a trellis tile: units `parts`, the next row's first `following`."""
    unit, start = divmod(bit, 16)

    def of_half(piece: Array) -> Array:
        return piece >> np.uint32(16) if half else piece & np.uint32(0xFFFF)

    states = of_half(parts[unit]) << np.uint32(16)
    if start + L > 16:  # the window reaches into the next unit
        later = parts[unit + 1] if unit + 1 < bits else following
        assert later is not None
        states = states | of_half(later)
    return (states >> np.uint32(32 - start - L)) & np.uint32(2**L - 1)


def table_lines(table: UInt32[Array, " entries"]) -> UInt32[Array, "lines lanes"]:
    """A table as a `PackedMatrix` holds it: rows of 128 words."""
    return jnp.pad(table, (0, -table.shape[0] % LANES)).reshape(-1, LANES)


def repack_lattice(
    words: UInt32[Array, " words"],
    bits: int,
    shape: tuple[int, int],
    scale: Float[Array, "rows one"],
    table: UInt32[Array, " entries"],
    second: UInt32[Array, " entries"] | None = None,
    residual_scale: float | None = None,
) -> PackedMatrix:
    """Arrange E8P (2 bits) or residual E8P (3, 4) as qjax stores them: a stream of 16, 24 or 32-bit codes.

    `W[o, i] = scale[o] · (q₀ + q₁ / residual_scale)`. `table` is E8P's, `second` that of a 3-bit residual.
    Raises KernelError for other widths, shapes, streams, tables, or scales that are not one or one per output.
    """
    out, inner = shape
    if bits not in (2, 3, 4) or inner % 8:
        raise KernelError(
            f"dequant_matmul: a lattice of {bits} bits, {out}×{inner}; allowed are 2, 3, 4 bits, inputs in eights"
        )
    needed = -(-out * inner * bits // 32)
    if words.shape[0] != needed:
        raise KernelError(f"dequant_matmul: {words.shape[0]} words for {out}×{inner} at {bits} bits; expected {needed}")
    tables = [table] if second is None else [table, second]
    if any(t.shape != (ENTRIES,) for t in tables) or (second is None) == (bits == 3):
        raise KernelError(
            f"dequant_matmul: tables of {[t.shape[0] for t in tables]} entries at {bits} bits; expected 256 of E8P, "
            "and at 3 bits as many of the second stage"
        )
    if (residual_scale is None) != (bits == 2) or (residual_scale is not None and not 0 < residual_scale < np.inf):
        raise KernelError(
            f"dequant_matmul: residual_scale {residual_scale} at {bits} bits; positive at 3 and 4, None at 2"
        )
    check_scales(scale, "scale", out, 1)
    codes = unpack_stream(words, 8 * bits, out * inner // 8).reshape(out, inner // 8).T
    codes = jnp.pad(codes, ((0, -inner % BLOCK // 8), (0, -out % LANES)))
    codes = codes.reshape(-1, ROWS, 4, codes.shape[1])  # [blocks, rows, codes of a row, lanes]
    second_bits = 8 * (bits - 2)

    def pieces(part: Array, width: int) -> list[Array]:
        each = 32 // width
        shift = (np.arange(4, dtype=np.uint32) % each * width).reshape(1, 1, 4, 1)
        placed = (part << shift).reshape(*part.shape[:2], 4 // each, each, part.shape[3])
        joined = jnp.sum(placed, axis=3, dtype=jnp.uint32)
        return [joined[:, :, p] for p in range(4 // each)]

    first = (codes >> np.uint32(second_bits)) & np.uint32(0xFFFF)
    found = pieces(first, 16)
    if second_bits:
        found += pieces(codes & np.uint32(2**second_bits - 1), second_bits)
    packed = jnp.concatenate(found, axis=1)
    zero = jnp.zeros((1, 1), scale.dtype)
    scales, offsets = (arranged(v, None, out, packed.shape[0] * BLOCK) for v in (scale, zero))
    residual = 0.0 if residual_scale is None else 1 / residual_scale
    return PackedMatrix(
        packed, scales, offsets, bits, (out, inner), None, "e8p" if bits == 2 else "e8p_rvq",
        table=table_lines(jnp.concatenate(tables)), residual=residual,
    )  # fmt: skip
