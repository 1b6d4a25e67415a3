"""Packed scalar grids in the order the kernels read them, and the function that decodes them.

A matrix `W[out, in]` of b-bit codes is stored by blocks of 512 inputs, transposed: outputs along the fastest axis, one
column of words each. A block is 32 *slabs* of 16 consecutive inputs. The b bits of a code lie in planes whose widths
are powers of two (3 = 2 + 1), so that no code straddles a word. A plane of width w has w pieces of `[16, out]` words,
and slab j is in piece `j mod w` at bit `j − j mod w`: one shift and one mask of a whole piece decode 16 rows of Wᵀ, in
their natural order and without moving a value to another lane.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt32

from pallas_kernels.dispatch import KernelError

__all__ = [
    "BLOCK",
    "LANES",
    "ROWS",
    "SLABS",
    "PackedMatrix",
    "arranged",
    "check_scales",
    "from_codes",
    "planes",
    "repack",
    "slab_values",
    "unpack_stream",
]

ROWS = 16
"""Inputs of a slab: the reduction of one tensor-core instruction, and a bfloat16 tile's sublanes."""
SLABS = 32
"""Slabs of a block: one per bit of a word."""
BLOCK = ROWS * SLABS
LANES = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale", "offset", "table"],
    meta_fields=["bits", "shape", "group", "code", "L", "V", "entries", "residual"],
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """`W[o, i] = scale[o, i // group] · code[o, i] + offset[o, i // group]`, padded to 512 inputs and 128 outputs.

    Attributes:
      words: uint32 `[blocks, 16 bits, out']`.
      scale: `[1, 1, out']` per row; `[blocks, 512 / group, out']` for groups within a block;
        `[in' / group, 1, out']` for groups of whole blocks.
      offset: likewise.
      bits: of a code, 1 to 8.
      shape: (out, in).
      group: inputs per scale, None is a whole row.
      code: name of a trellis or lattice code, None for a scalar grid.
      L: bits of a trellis state, 0 without a trellis.
      V: inputs per state of a trellis.
      entries: of HYB's table.
      residual: the factor on a lattice's second stage.
      table: uint32 `[lines, 128]` of a code with a table (see `tables`), shared by matrices.
    """

    words: Any
    scale: Any
    offset: Any
    bits: int
    shape: tuple[int, int]
    group: int | None
    code: str | None = None
    L: int = 0
    V: int = 1
    entries: int = 0
    residual: float = 0.0
    table: Any = None

    @property
    def padded(self) -> tuple[int, int]:
        """(out', in'): the shape with padding."""
        return self.words.shape[2], self.words.shape[0] * BLOCK

    @property
    def blocks_per_scale(self) -> int:
        """Consecutive blocks that share a slice `scale[i]`."""
        return self.words.shape[0] if self.group is None else max(1, self.group // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and offsets; a table is shared."""
        return sum(x.size * np.dtype(x.dtype).itemsize for x in (self.words, self.scale, self.offset))


def planes(bits: int) -> list[int]:
    """Widths of the planes, the one of the lowest bits first: the powers of two in `bits`, descending."""
    return [w for w in (8, 4, 2, 1) if bits & w]


def slab_values(parts: Sequence[Array], bits: int, j: int, shift: Array | None = None) -> Array:
    """Codes of inputs `16 j … 16 j + 15` of a block, float32 `[16, lanes]`, from its `bits` pieces `[16, lanes]`.

    With `shift`, 0 or 16, those of slab `j + shift`.
    """
    code, first, low = None, 0, 0
    for width in planes(bits):
        part = parts[first + j % width]
        own = np.uint32(j - j % width)
        value = (part >> (own if shift is None else shift + own)) & np.uint32(2**width - 1)
        code = value if code is None else code | (value << np.uint32(low))
        first, low = first + width, low + width
    assert code is not None
    return code.astype(jnp.int32).astype(jnp.float32)


def check_scales(values: Array, name: str, out: int, groups: int) -> None:
    """Raises KernelError unless there is one row or one per output."""
    if values.shape not in ((out, groups), (1, groups)):
        raise KernelError(f"dequant_matmul: {name} of shape {values.shape}; expected ({out} or 1, {groups})")


def arranged(values: Array, group: int | None, out: int, inner: int) -> Array:
    """Scales or offsets `[out or 1, groups]` as a `PackedMatrix` holds them."""
    values = jnp.broadcast_to(values, (out, values.shape[1])).T
    padded_in = -(-inner // BLOCK) * BLOCK
    groups = 1 if group is None else padded_in // group
    values = jnp.pad(values, ((0, groups - values.shape[0]), (0, -out % LANES)))
    return values.reshape(-1, max(1, BLOCK // group) if group else 1, values.shape[1])


def from_codes(
    codes: Integer[Array, "out in"],
    bits: int,
    scale: Float[Array, "rows groups"],
    offset: Float[Array, "rows groups"],
    group: int | None = None,
) -> PackedMatrix:
    """Arrange codes for the kernels; scales and offsets have one row or one per output, and keep their dtype.

    Raises KernelError when bits is not 1 … 8, when a group is not a multiple of 16 that divides 512, nor a multiple of
    512, or when the number of groups is not `ceil(in / group)`.
    """
    out, inner = codes.shape
    if not 1 <= bits <= 8:
        raise KernelError(f"dequant_matmul: codes of {bits} bits; allowed are 1 to 8")
    if group is not None and group % BLOCK and (group % ROWS or BLOCK % group):
        raise KernelError(f"dequant_matmul: groups of {group}; allowed are 16, 32, …, 512 and multiples of {BLOCK}")
    groups = 1 if group is None else -(-inner // group)
    check_scales(scale, "scale", out, groups)
    check_scales(offset, "offset", out, groups)
    # groups larger than a block need whole groups of blocks
    unit = BLOCK if group is None else math.lcm(BLOCK, group)
    rows = jnp.pad(codes.astype(jnp.uint32).T, ((0, -inner % unit), (0, -out % LANES)))
    slabs = rows.reshape(-1, SLABS, ROWS, rows.shape[1])
    pieces, low = [], 0
    for width in planes(bits):
        value = (slabs >> np.uint32(low)) & np.uint32(2**width - 1)
        value = value.reshape(slabs.shape[0], SLABS // width, width, ROWS, rows.shape[1])
        shift = jnp.arange(0, SLABS, width, dtype=jnp.uint32).reshape(1, -1, 1, 1, 1)
        pieces.append(jnp.sum(value << shift, axis=1, dtype=jnp.uint32))
        low += width
    words = jnp.concatenate(pieces, axis=1).reshape(slabs.shape[0], bits * ROWS, rows.shape[1])
    padded = rows.shape[0]
    return PackedMatrix(
        words, arranged(scale, group, out, padded), arranged(offset, group, out, padded), bits, (out, inner), group
    )


def unpack_stream(words: Array, bits: int, count: int) -> Array:
    """Codes of a little-endian bit stream: code i is bits `[i bits, (i + 1) bits)`, bit j is bit `j % 32` of a word."""
    periods = -(-count // 32)  # 32 codes and `bits` words end together
    stream = jnp.pad(words, (0, periods * bits - words.shape[0])).reshape(periods, bits)
    codes = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = stream[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | (stream[:, word + 1] << np.uint32(32 - shift))
        codes.append(code & np.uint32(2**bits - 1))
    return jnp.stack(codes, axis=1).reshape(-1)[:count]


def repack(
    words: UInt32[Array, " words"],
    bits: int,
    shape: tuple[int, int],
    scale: Float[Array, "rows groups"],
    offset: Float[Array, "rows groups"],
    group: int | None = None,
) -> PackedMatrix:
    """`from_codes` of the row-major little-endian bit stream that qjax stores. Done once, when a model is loaded.

    Raises KernelError when the stream has not `ceil(bits · out · in / 32)` words, and what `from_codes` raises.
    """
    count = shape[0] * shape[1]
    if not 1 <= bits <= 8 or words.shape[0] != -(-count * bits // 32):
        raise KernelError(
            f"dequant_matmul: a stream of {words.shape[0]} words for {shape[0]}×{shape[1]} codes of {bits} bits; "
            f"expected {-(-count * bits // 32)} words and 1 to 8 bits"
        )
    return from_codes(unpack_stream(words, bits, count).reshape(shape), bits, scale, offset, group)
