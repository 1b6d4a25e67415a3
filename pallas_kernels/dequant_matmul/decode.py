"""The one decoder of packed weights: of the reference, of all kernels and of the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.dequant_matmul import tables, trellis
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix, slab_values

__all__ = ["block_weights", "by_slabs", "scale_line", "static"]


def block_weights(
    parts: Sequence[Array],
    following: Array | None,
    weight: PackedMatrix,
    scales: Callable[[int], tuple[Array, Array]],
    lookup: Callable[[int, int, Array], Array] | None = None,
) -> Iterator[Array]:
    """The 32 slabs of a block of Wᵀ, each 16 rows, float32 `[16, lanes]`.

    Args:
      parts: the block's `bits` pieces `[16, lanes]`.
      following: for a trellis, the first piece of the next row of every tile.
      weight: for its static fields only.
      scales: `(scale, offset)`, each `[1, lanes]`, of a slab.
      lookup: for a code with a table, see `tables`.
    """
    if weight.table is not None:
        assert lookup is not None
        value_of = tables.decoder(parts, following, weight, lookup)
    else:
        value_of = functools.partial(_computed, parts, following, weight)
    for j in range(SLABS):
        scale, offset = scales(j)
        yield value_of(j) * scale.astype(jnp.float32) + offset.astype(jnp.float32)


def _computed(parts: Sequence[Array], following: Array | None, weight: PackedMatrix, j: int) -> Array:
    if weight.code is None:
        return slab_values(parts, weight.bits, j)
    assert following is not None
    return trellis.slab_values(parts, following, weight.bits, j, weight.code, weight.L)


def static(weight: PackedMatrix) -> PackedMatrix:
    """The matrix with shapes in place of arrays, for a kernel to close over."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weight)


def scale_line(weight: PackedMatrix, j: int) -> int:
    """The index of slab j's row among the block's rows of scales."""
    return j * ROWS * weight.scale.shape[1] // BLOCK


def by_slabs(x: Array, weight: PackedMatrix, rows: int) -> Array:
    """x `[batch, in]`, padded, as `[blocks, rows, 512]` with a block's inputs in the order of its slabs."""
    blocks = weight.words.shape[0]
    x = jnp.pad(x, ((0, rows - x.shape[0]), (0, blocks * BLOCK - x.shape[1]))).reshape(rows, blocks, BLOCK)
    if weight.code is not None:
        x = x.reshape(rows, blocks, ROWS, SLABS).swapaxes(2, 3).reshape(rows, blocks, BLOCK)
    return x.transpose(1, 0, 2)
