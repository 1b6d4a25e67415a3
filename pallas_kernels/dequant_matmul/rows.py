"""Packed weights as the Mosaic GPU kernel reads them: a tile of 128 outputs after another, a row of words per output.

A piece of a block, `[16, out]` in a `PackedMatrix`, becomes `[128, 16]` for each tile of outputs: a slab decoded from
it has 16 inputs of 128 outputs, which is how tensor cores take their left operand. A block's pieces are consecutive in
memory. Nothing is decoded or added, except for a trellis: its windows reach into the next row of a
16 × 16 tile. So the 128 outputs of a tile are ordered by their row within the 16 × 16 tiles first, `m = 8 r + tile`:
"the next row" is 8 rows further down, and the first piece ends with its first 8 rows once more, for the last ones to
reach into. That is one part in 16 K of the words.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul.layout import BLOCK, LANES, ROWS, PackedMatrix
from pallas_kernels.dispatch import KernelError

__all__ = ["AFTER", "RowMatrix", "from_rows", "outputs_in_order", "to_rows"]

AFTER = LANES // 16
"""Rows from one row of a 16 × 16 tile to the next: how many such tiles 128 outputs are."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "rest", "scale", "offset"],
    meta_fields=["bits", "shape", "group", "code", "L"],
)
@dataclasses.dataclass(frozen=True)
class RowMatrix:
    """A `PackedMatrix` in another order.

    Attributes:
      first: uint32 `[tiles, blocks, 128, 16]`, the first piece of every block; of a trellis `[…, 136, 16]`.
      rest: uint32 `[tiles, blocks, bits − 1, 128, 16]`, the other pieces; None for one bit.
      scale: as in a `PackedMatrix`, the outputs in their natural order.
      offset: likewise.
      bits: as in a `PackedMatrix`.
      shape: likewise.
      group: likewise.
      code: likewise.
      L: likewise.
    """

    first: Any
    rest: Any
    scale: Any
    offset: Any
    bits: int
    shape: tuple[int, int]
    group: int | None
    code: str | None = None
    L: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of 512 inputs."""
        return self.first.shape[1]

    @property
    def padded(self) -> tuple[int, int]:
        """(out', in'): the shape with padding."""
        return self.first.shape[0] * LANES, self.blocks * BLOCK

    @property
    def blocks_per_scale(self) -> int:
        """Consecutive blocks that share a slice `scale[i]`."""
        return self.blocks if self.group is None else max(1, self.group // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and offsets."""
        leaves = (self.first, self.rest, self.scale, self.offset)
        return sum(x.size * np.dtype(x.dtype).itemsize for x in leaves if x is not None)


def to_rows(weight: PackedMatrix) -> RowMatrix:
    """A packed matrix in the order in which the Mosaic GPU kernel reads it. Done once, when a model is loaded.

    Raises KernelError for a code with a table.
    """
    if weight.table is not None:
        raise KernelError(f"dequant_matmul: code {weight.code!r} has a table; Mosaic GPU has no gather to read it with")
    blocks, _, out = weight.words.shape
    words = weight.words.reshape(blocks, weight.bits, ROWS, out // LANES, LANES)
    words = words.transpose(3, 0, 1, 4, 2)  # [tiles, blocks, pieces, 128, 16]
    if weight.code is not None:
        words = words.reshape(*words.shape[:3], AFTER, 16, ROWS).swapaxes(3, 4).reshape(words.shape)
    first, rest = words[:, :, 0], words[:, :, 1:] if weight.bits > 1 else None
    if weight.code is not None:
        first = jnp.concatenate([first, first[:, :, :AFTER]], axis=2)
    return RowMatrix(
        first, rest, weight.scale, weight.offset, weight.bits, weight.shape, weight.group, weight.code, weight.L
    )


def from_rows(weight: RowMatrix) -> PackedMatrix:
    """The inverse of `to_rows`."""
    words = weight.first[:, :, None, :LANES]
    if weight.rest is not None:
        words = jnp.concatenate([words, weight.rest], axis=2)
    if weight.code is not None:
        words = words.reshape(*words.shape[:3], 16, AFTER, ROWS).swapaxes(3, 4).reshape(words.shape)
    words = words.transpose(1, 2, 4, 0, 3).reshape(weight.blocks, weight.bits * ROWS, -1)
    return PackedMatrix(
        words, weight.scale, weight.offset, weight.bits, weight.shape, weight.group, weight.code, weight.L
    )


def outputs_in_order(y: Float[Array, "batch out"], weight: RowMatrix) -> Float[Array, "batch out"]:
    """Outputs as the kernel has them, tiles of 128, in their natural order."""
    if weight.code is None:
        return y
    return y.reshape(y.shape[0], -1, 16, AFTER).swapaxes(2, 3).reshape(y.shape)
