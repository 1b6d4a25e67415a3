"""Common part of the bodies of the Triton kernel: the places of a program's words and scales, and their reading."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, PackedMatrix, planes
from pallas_kernels.dequant_matmul.triton.values import Decoder
from pallas_kernels.triton import Instructions

__all__ = ["Program"]


class Program:
    """A tile of outputs and a range of blocks, `first` to `end`; `scales` are the references of scales and offsets."""

    def __init__(
        self, words: Any, scales: Any, table: Any, weight: PackedMatrix, ops: Instructions, strips: int, blocks: int
    ) -> None:
        self.words, self.scales, self.weight, self.ops = words, scales, weight, ops
        # entries of a table come from the first cache
        self.decoder = Decoder(ops, lambda first, _, index: table[index.astype(jnp.int32) + first])
        self.tile, self.strips = words.shape[2], strips
        self.lanes = self.tile // strips
        self.first = pl.program_id(1) * blocks
        self.end = jnp.minimum(self.first + blocks, words.shape[0])

    def piece(self, block: Array, first: int, rows: int, strip: int) -> Array:
        """Words `[rows, lanes]` of a strip of a block."""
        return self.words[block, first : first + rows, strip * self.lanes : (strip + 1) * self.lanes]

    def pieces(self, block: Array, strip: int) -> tuple[Array, ...]:
        """A block's pieces of 16 rows and, of a trellis, the next row of every tile."""
        found = tuple(self.piece(block, i * ROWS, ROWS, strip) for i in range(self.weight.bits))
        if self.weight.L:  # in the first cache by now
            row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 0)
            lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 1) + strip * self.lanes
            found += (self.words[block, row, (lane & -16) | ((lane + 1) & 15)],)
        return found

    def planes(self, block: Array, strip: int) -> tuple[Array, ...]:
        """The planes of a scalar grid, `[16 width, lanes]`."""
        widths = planes(self.weight.bits)
        return tuple(self.piece(block, ROWS * sum(widths[:n]), ROWS * width, strip) for n, width in enumerate(widths))

    def scale(self, which: int, block: Array, first: int, rows: int, strip: int | None = None) -> Array:
        """Scales (0) or offsets (1) of `rows` inputs from `first` of a block, float32 `[rows or 1, lanes]`.

        Of the whole tile without a strip.
        """
        ref, weight = self.scales[which], self.weight
        start, lanes = (0, self.tile) if strip is None else (strip * self.lanes, self.lanes)
        group = jax.lax.div(block, jnp.int32(weight.blocks_per_scale))
        lines = weight.scale.shape[1]
        if rows <= BLOCK // lines:
            line = first * lines // BLOCK
            return ref[group, line : line + 1, start : start + lanes].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1) + start
        return ref[group, jax.lax.div(first + row, jnp.int32(BLOCK // lines)), lane].astype(jnp.float32)
