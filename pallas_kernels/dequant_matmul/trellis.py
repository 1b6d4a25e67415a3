"""Trellis codes in the slabs of the kernels: one shift and a hash (1MAD, 3INST, mul1) or a look-up (HYB) per state.

A tile of 16 × 16 weights is a circular string of 256 K bits, row by row; weight t is a function of the L-bit window
that begins at bit t K, most significant bit first. A row of a tile, 16 inputs of one output, is K units of 16 bits and
the first unit of the next row. Two tiles, 32 inputs, share K words: unit i of the first in the low half of word i, of
the second in the high half. The 16 pairs of a block are the rows of a piece, so slab j of a block has inputs
j, 32 + j, 64 + j, …: x is permuted, not the weights.

Only 32-bit integers and float32 are used, so that TPUs have the same bits: float16 sums are formed in float32, where
they are exact, and rounded once on the bits. All sums are multiples of 2⁻¹⁸, so no subnormal is ever rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from pallas_kernels.dequant_matmul.layout import BLOCK, LANES, ROWS, SLABS, PackedMatrix, arranged, check_scales
from pallas_kernels.dequant_matmul.tables import TRELLISES, table_lines, window
from pallas_kernels.dispatch import KernelError

__all__ = [
    "CODES",
    "FLIPPED_3INST",
    "KEPT_3INST",
    "MUL1",
    "MUL1_BITS",
    "half_values",
    "hashed",
    "repack_trellis",
    "slab_values",
    "state_values",
    "unit",
]

CODES = ("1mad", "3inst", "mul1")
KEPT_3INST, FLIPPED_3INST = 0x8FFF8FFF, 0x3B603B60
"""The bits of a hash that two float16 are made of, and those that are flipped."""
MUL1_BITS = 0x1EEE, 0xC931
_BYTE_SCALE = np.float32(1 / 147.800537109375)
MUL1 = _MUL1_SCALE, _MUL1_SHIFT = tuple(float(x) for x in np.array(MUL1_BITS, np.uint16).view(np.float16))
"""A value of mul1 is `scale (1024 + the sum of bytes) + shift`, rounded to float16."""


def _byte_sum(x: Array) -> Array:
    """The sum of the four bytes, float32: two at a time, so that nothing carries over."""
    pairs = (x & np.uint32(0x00FF00FF)) + ((x >> np.uint32(8)) & np.uint32(0x00FF00FF))
    return ((pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))).astype(jnp.int32).astype(jnp.float32)


def _to_half(x: Array) -> Array:
    """float32 rounded to 11 significant bits, ties to even."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _widened(half: Array) -> Array:
    """The normal float16 number in the low 16 bits, as float32."""
    sign, magnitude = half & np.uint32(0x8000), half & np.uint32(0x7FFF)
    bits = (sign << np.uint32(16)) | ((magnitude << np.uint32(13)) + np.uint32(112 << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def hashed(code: str, states: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The word that the value of a state is made of: a linear congruence modulo 2³²."""
    if code == "1mad":
        return states * np.uint32(34038481) + np.uint32(76625530)
    if code == "mul1":
        return states * np.uint32(0x83DCD12D)
    return states * np.uint32(89226354) + np.uint32(64248484)


def state_values(code: str, states: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The value of every state, float32. Source: QTIP (2406.11235), section 3.1; EXL3's format for mul1."""
    if code == "1mad":
        return (_byte_sum(hashed(code, states)) - np.float32(510)) * _BYTE_SCALE
    if code == "mul1":
        total = _byte_sum(hashed(code, states)) + np.float32(1024)
        return _to_half(total * np.float32(_MUL1_SCALE) + np.float32(_MUL1_SHIFT))
    x = (hashed(code, states) & np.uint32(KEPT_3INST)) ^ np.uint32(FLIPPED_3INST)
    return _to_half(_widened(x >> np.uint32(16)) + _widened(x & np.uint32(0xFFFF)))


def half_values(code: str, states: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The value of every state over `unit(code)`, exactly, in float16: for devices that have it, in fewer operations.

    `state_values = float32(half_values) · unit`: a sum of two float16 is one instruction there, and a rounding is a
    conversion; 1MAD's values are whole numbers up to 510 before they are scaled.
    """
    if code == "1mad":
        return (_byte_sum(hashed(code, states)) - np.float32(510)).astype(jnp.float16)
    if code == "mul1":
        total = _byte_sum(hashed(code, states)) + np.float32(1024)
        return (total * np.float32(_MUL1_SCALE) + np.float32(_MUL1_SHIFT)).astype(jnp.float16)
    x = (hashed(code, states) & np.uint32(KEPT_3INST)) ^ np.uint32(FLIPPED_3INST)
    low, high = (jax.lax.bitcast_convert_type(h.astype(jnp.uint16), jnp.float16) for h in (x, x >> np.uint32(16)))
    return high + low


def unit(code: str) -> float:
    """The unit of `half_values`: all are whole multiples of it."""
    return float(_BYTE_SCALE) if code == "1mad" else 1.0


def slab_values(parts: Sequence[Array], following: Array, bits: int, j: int, code: str, L: int) -> Array:
    """Slab j of a block, float32 `[16, lanes]`: `parts` are its pieces, `following` the next row's first piece."""
    half, t = divmod(j, ROWS)
    return state_values(code, window(parts, following, bits, half, t * bits, L))


def repack_trellis(
    words: UInt32[Array, " words"],
    bits: int,
    shape: tuple[int, int],
    scale: Float[Array, "rows one"],
    code: str = "1mad",
    L: int = 16,
    table: Float[Array, "entries V"] | None = None,
) -> PackedMatrix:
    """Arrange the stream of a trellis (L, K = bits) as qjax stores it: 16-bit units, two to a word, by tiles.

    `W[o, i] = scale[o] · value(state)`; HYB has a table of 2^6 to 2^9 entries and V = 1 or 2 weights per state, the
    others none and one. Raises KernelError for other codes, bits (1 … 4), L (K V … 16), tables, shapes that are not
    whole tiles, streams of another length, or scales that are not one or one per output.
    """
    out, inner = shape
    values = 1 if table is None else table.shape[1]
    if code not in (*CODES, *TRELLISES) or not 1 <= bits <= 4 or not bits * values <= L <= 16:
        raise KernelError(
            f"dequant_matmul: trellis code {code!r}, {bits} bits, L = {L}; "
            f"allowed are {', '.join((*CODES, *TRELLISES))}, 1 to 4 bits, L from the bits of a step to 16"
        )
    if (table is None) != (code in CODES):
        raise KernelError(f"dequant_matmul: code {code!r} {'needs' if table is None else 'has no'} table")
    if table is not None and (table.shape[0] not in (64, 128, 256, 512) or values not in (1, 2)):
        raise KernelError(f"dequant_matmul: a table of {table.shape}; HYB has 64 to 512 entries of 1 or 2 values")
    needed = out * inner * bits // 32
    if out % 16 or inner % 16 or words.shape[0] != needed:
        raise KernelError(
            f"dequant_matmul: {words.shape[0]} words for a trellis of {out}×{inner}; tiles are 16×16, {needed} words"
        )
    check_scales(scale, "scale", out, 1)
    units = jnp.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=1)
    units = units.reshape(out // 16, inner // 16, 16, bits).transpose(1, 3, 0, 2).reshape(inner // 16, bits, out)
    units = jnp.pad(units, ((0, -(inner // 16) % SLABS), (0, 0), (0, -out % LANES)))
    pairs = units.reshape(-1, SLABS // 2, 2, bits, units.shape[2])
    joined = pairs[:, :, 0] | (pairs[:, :, 1] << np.uint32(16))  # [blocks, pairs, units, lanes]
    packed = joined.transpose(0, 2, 1, 3).reshape(-1, bits * ROWS, units.shape[2])
    padded = packed.shape[0] * BLOCK
    zero = jnp.zeros((1, 1), scale.dtype)
    scales, offsets = (arranged(v, None, out, padded) for v in (scale, zero))
    entries, lines = 0, None
    if table is not None:
        entries = table.shape[0]
        lines = table_lines(jax.lax.bitcast_convert_type(table.T.reshape(-1).astype(jnp.float32), jnp.uint32))
    return PackedMatrix(packed, scales, offsets, bits, (out, inner), None, code, L, values, entries, 0.0, lines)
