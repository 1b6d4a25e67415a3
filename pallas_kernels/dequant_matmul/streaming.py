"""Products of few rows with packed weights on a CPU: weights are decoded in vector registers and never stored.

XLA does not vectorise a reduction over decoded values, nor fuse one with a matrix product. It does vectorise chains of
elementwise operations: the accumulator keeps 16 partial sums of every output, one for each row of a piece, and a loop
over pieces adds all that one piece of words holds, `acc += code(words >> shift) · x`, before the 16 are summed once.
Scales of whole rows are applied to the sums. What a last block has beyond the matrix is not decoded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul import tables, trellis
from pallas_kernels.dequant_matmul.decode import by_slabs
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix, planes
from pallas_kernels.dispatch import backend

__all__ = ["LARGEST_BATCH", "matmul", "suits"]

LARGEST_BATCH = 8
"""Rows for which decoding on the fly is measured to be faster than decoding once and multiplying."""


def suits(batch: int, dtype: Any, weight: PackedMatrix) -> bool:
    """Whether `matmul` is what XLA should run: on a CPU, for few rows of float32."""
    coded = weight.code is None or weight.code in trellis.CODES or weight.code == "e8p"
    return backend() == "cpu" and 0 < batch <= LARGEST_BATCH and dtype == jnp.float32 and coded


def matmul(x: Float[Array, "batch in"], weight: PackedMatrix) -> Float[Array, "batch out"]:
    """`x Wᵀ` in float32, with sums in another order than the reference's."""
    blocks, batch = weight.words.shape[0], x.shape[0]
    inputs = by_slabs(x, weight, batch).reshape(blocks, batch, SLABS, ROWS).transpose(0, 2, 1, 3)[..., None]
    sums_of = {None: _scalar_sums, "e8p": _lattice_sums}.get(weight.code, _trellis_sums)
    sums = sums_of(inputs, weight)
    # A product with ones, not a sum: XLA would join a sum with all that is added up, and not vectorise the whole.
    y = jnp.einsum("brl,r->bl", sums, jnp.ones(ROWS, jnp.float32), precision="highest")
    if weight.scale.shape[:2] == (1, 1):
        y = y * weight.scale[0].astype(jnp.float32)
    if weight.code is None:
        y = y + _offsets(x, weight)
    return y[:, : weight.shape[0]].reshape(batch, weight.shape[0])


def _scalar_sums(x: Float[Array, "blocks slabs batch 16 1"], weight: PackedMatrix) -> Float[Array, "batch 16 lanes"]:
    """`Σ scale · code · x` by rows of a piece; the scale of whole rows is left out."""
    blocks, _, batch = x.shape[:3]
    lanes = weight.words.shape[2]
    whole, rest = divmod(weight.shape[1], BLOCK)
    grouped = weight.scale.shape[:2] != (1, 1)
    total, first, low = jnp.zeros((batch, ROWS, lanes), jnp.float32), 0, 0
    for width in planes(weight.bits):
        # [blocks, pieces, slabs of a piece, ...]: slabs of all pieces have the same shifts
        by_piece = x.reshape(blocks, SLABS // width, width, batch, ROWS, 1).swapaxes(1, 2)

        def add(k: Array, acc: Array, start: int, count: int, width: int, first: int, by_piece: Array) -> Array:
            """Adds `count` slabs of piece k, counted from block `start`."""
            block, piece = start + k // width, k % width
            words = jax.lax.dynamic_slice(weight.words, (block, (first + piece) * ROWS, 0), (1, ROWS, lanes))[0]
            own = jax.lax.dynamic_slice(by_piece, (block, piece, 0, 0, 0, 0), (1, 1, *by_piece.shape[2:]))[0, 0]
            if grouped:
                index = block // weight.blocks_per_scale
                scale = jax.lax.dynamic_index_in_dim(weight.scale, index, 0, keepdims=False).astype(jnp.float32)
            for i in range(count):
                code = (words >> np.uint32(i * width)) & np.uint32(2**width - 1)
                value = code.astype(jnp.int32).astype(jnp.float32)
                if grouped:  # the line of slab `i width + piece`
                    lines = weight.scale.shape[1]
                    line = (i * width + piece) * ROWS * lines // BLOCK
                    value = value * jax.lax.dynamic_slice_in_dim(scale, line, 1)
                acc = acc + value[None] * own[i]
            return acc

        fixed = {"width": width, "first": first, "by_piece": by_piece}
        acc = jnp.zeros_like(total)
        acc = jax.lax.fori_loop(0, whole * width, functools.partial(add, start=0, count=SLABS // width, **fixed), acc)
        if rest:
            count = -(-rest // (ROWS * width))
            acc = jax.lax.fori_loop(0, width, functools.partial(add, start=whole, count=count, **fixed), acc)
        total = total + 2.0**low * acc
        first, low = first + width, low + width
    return total


def _offsets(x: Float[Array, "batch in"], weight: PackedMatrix) -> Float[Array, "batch lanes"]:
    """`Σ offset · x`."""
    size = weight.shape[1] if weight.group is None else weight.group
    groups = -(-weight.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, groups * size - weight.shape[1])))
    sums = jnp.sum(x.reshape(x.shape[0], groups, size), axis=2)
    offset = weight.offset.reshape(-1, weight.offset.shape[2])[:groups].astype(jnp.float32)
    return jnp.matmul(sums, offset, precision="highest")


def _trellis_sums(x: Float[Array, "blocks slabs batch 16 1"], weight: PackedMatrix) -> Float[Array, "batch 16 lanes"]:
    """`Σ value · x` by rows of a piece."""
    blocks, _, batch = x.shape[:3]
    lanes, bits, L, code = weight.words.shape[2], weight.bits, weight.L, weight.code
    assert code is not None
    pieces = weight.words.reshape(blocks, bits, ROWS, lanes)
    following = jnp.roll(pieces[:, 0].reshape(blocks, ROWS, -1, 16), -1, axis=3).reshape(blocks, 1, ROWS, lanes)
    by_half = x.reshape(blocks, 2, ROWS, batch, ROWS, 1)

    def add(k: Array, acc: Array, start: int, rows: int) -> Array:
        """Adds the first `rows` rows of one half of a block, 16 inputs each."""
        block, half = start + k // 2, k % 2
        at = (block, 0, 0, 0)
        own = jax.lax.dynamic_slice(pieces, at, (1, bits, rows, lanes))[0]
        after = jax.lax.dynamic_slice(following, at, (1, 1, rows, lanes))[0]
        inputs = jax.lax.dynamic_slice(by_half, (block, half, 0, 0, 0, 0), (1, 1, ROWS, batch, rows, 1))[0, 0]
        shift = (16 * half).astype(jnp.uint32)
        units = [(unit >> shift) & np.uint32(0xFFFF) for unit in (*own, after[0])]
        windows = [(unit << np.uint32(16)) | after for unit, after in itertools.pairwise(units)]
        for t in range(ROWS):
            unit, first = divmod(t * bits, 16)
            state = (windows[unit] >> np.uint32(32 - first - L)) & np.uint32(2**L - 1)
            acc = acc + trellis.state_values(code, state)[None] * inputs[t]
        return acc

    return _over_blocks(add, 2, weight.shape[1], batch, lanes)


def _over_blocks(add: Callable[..., Array], turns: int, inputs: int, batch: int, lanes: int) -> Array:
    """Sums over all inputs by rows of a piece: `add(k, acc, start, rows)` adds turn k of the blocks from `start` on.

    A block takes `turns` turns, always two or more: XLA would write out a loop of one and join it with what surrounds
    it. The last block has only the rows that hold inputs.
    """
    whole, rest = divmod(inputs, BLOCK)
    acc = jnp.zeros((batch, ROWS, lanes), jnp.float32)
    acc = jax.lax.fori_loop(0, turns * whole, functools.partial(add, start=0, rows=ROWS), acc)
    if rest:
        rows = -(-rest // SLABS)
        last = jnp.zeros((batch, rows, lanes), jnp.float32)
        last = jax.lax.fori_loop(0, turns, functools.partial(add, start=whole, rows=rows), last)
        acc = acc + jnp.pad(last, ((0, 0), (0, ROWS - rows), (0, 0)))
    return acc


def _lattice_sums(x: Float[Array, "blocks slabs batch 16 1"], weight: PackedMatrix) -> Float[Array, "batch 16 lanes"]:
    """`Σ value · x` of E8P by rows of a piece: entries are looked up first, for no vector unit follows a look-up.

    A value is half a nibble and a constant that eight inputs share: inputs are halved, the constant meets their sum.
    """
    blocks, _, batch = x.shape[:3]
    lanes = weight.words.shape[2]
    pieces = weight.words.reshape(blocks, 2, ROWS, lanes)
    by_code = x.reshape(blocks, 4, 8, batch, ROWS, 1)
    shared = jnp.sum(by_code, axis=2)
    by_code = by_code * np.float32(0.5)
    table = weight.table.reshape(-1)

    def lookup(_: int, __: int, index: Array) -> Array:
        return jnp.take(table, index.astype(jnp.int32), mode="clip")

    def add(k: Array, acc: Array, start: int, rows: int) -> Array:
        """Adds the first `rows` rows of one code of a block, 8 inputs each."""
        block, q = start + k // 4, k % 4
        words = jax.lax.dynamic_slice(pieces, (block, q // 2, 0, 0), (1, 1, rows, lanes))[0, 0]
        codes = (words >> (q % 2 * 16).astype(jnp.uint32)) & np.uint32(0xFFFF)
        nibbles, constant = jax.lax.optimization_barrier(tables.e8p_nibbles(codes, lookup))
        inputs = jax.lax.dynamic_slice(by_code, (block, q, 0, 0, 0, 0), (1, 1, 8, batch, rows, 1))[0, 0]
        sums = jax.lax.dynamic_slice(shared, (block, q, 0, 0, 0), (1, 1, batch, rows, 1))[0, 0]
        acc = acc + constant[None] * sums
        for i, place in enumerate(tables.NIBBLES):
            whole_nibble = (nibbles >> np.uint32(4 * place)) & np.uint32(15)
            acc = acc + whole_nibble.astype(jnp.int32).astype(jnp.float32)[None] * inputs[i]
        return acc

    return _over_blocks(add, 4, weight.shape[1], batch, lanes)
