"""Streaming dequantise-and-multiply on a GPU: every program owns a tile of outputs and reads its packed words once.

A slab of 16 inputs is decoded in registers, by one shift, one mask and one multiply-add per weight, and multiplied at
once: by tensor cores for 2 to 16 rows, by plain multiply-adds for one. Where tiles are too few to fill the device the
inputs are split too, and the partial sums, a few percent of the weights' bytes at most, are added by XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul.decode import by_slabs, scale_line, slab_weights, static
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix
from pallas_kernels.triton import parameters, unavailable

__all__ = ["matmul", "obstacle"]

_TILE = 64
_PROGRAMS = 512
"""Programs to aim for: about four per multiprocessor of the largest devices."""


def obstacle(batch: int, weight: PackedMatrix) -> str | None:
    """Why the product with `batch` rows cannot run, None when it can."""
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    return unavailable()


def _splits(rows: int, weight: PackedMatrix) -> int:
    """Parts of the inputs: enough programs, equal parts, partial sums written and read at most 5% of the weights."""
    out, padded = weight.padded
    blocks = padded // BLOCK
    most = min(_PROGRAMS // (out // _TILE), weight.nbytes // (20 * 8 * rows * out))
    return max([s for s in range(1, blocks + 1) if blocks % s == 0 and s <= most], default=1)


def _kernel(x_ref: Any, words_ref: Any, scale_ref: Any, offset_ref: Any, y_ref: Any, *, weight: PackedMatrix) -> None:
    rows = x_ref.shape[1]
    blocks = words_ref.shape[0] // pl.num_programs(1)
    first = pl.program_id(1) * blocks
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, _TILE), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, _TILE), 0)

    def step(i: Array, total: Array) -> Array:
        block = first + i
        parts = [words_ref[block, i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
        following = None
        if weight.code is not None:  # the next row of every tile: in the first cache by now
            following = words_ref[block, row, (lane & -16) | ((lane + 1) & 15)]
        line = jax.lax.div(block, jnp.int32(weight.blocks_per_scale))
        scales: dict[int, tuple[Array, Array]] = {}
        for j in range(SLABS):
            own = scale_line(weight, j)
            if own not in scales:
                scales[own] = scale_ref[line, own : own + 1, :], offset_ref[line, own : own + 1, :]
            weights = slab_weights(parts, following, weight, j, *scales[own]).astype(x_ref.dtype)
            if rows == 1:
                x = x_ref[block, 0, j * ROWS : (j + 1) * ROWS]
                total = total + x.astype(jnp.float32)[:, None] * weights.astype(jnp.float32)
            else:
                x = x_ref[block, :, j * ROWS : (j + 1) * ROWS]
                precision = jax.lax.Precision.HIGHEST
                total = total + jax.lax.dot(x, weights, precision=precision, preferred_element_type=jnp.float32)
        return total

    start = jnp.zeros((ROWS if rows == 1 else rows, words_ref.shape[2]), jnp.float32)
    total = jax.lax.fori_loop(0, blocks, step, start)
    y_ref[...] = (jnp.sum(total, axis=0, keepdims=True) if rows == 1 else total).astype(y_ref.dtype)


def matmul(x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False) -> Float[Array, "batch out"]:
    """`x Wᵀ`, W decoded in float32 and rounded to the dtype of x, summed in float32; see `obstacle`."""
    batch = x.shape[0]
    out, padded = weight.padded
    blocks = padded // BLOCK
    rows = 1 if batch == 1 else 16
    splits = _splits(rows, weight)
    x = by_slabs(x, weight, rows)
    scales = pl.BlockSpec((*weight.scale.shape[:2], _TILE), lambda n, s: (0, 0, n))
    y = pl.pallas_call(
        functools.partial(_kernel, weight=static(weight)),
        grid=(out // _TILE, splits),
        in_specs=[
            pl.BlockSpec((blocks, rows, BLOCK), lambda n, s: (0, 0, 0)),
            pl.BlockSpec((blocks, weight.bits * ROWS, _TILE), lambda n, s: (0, 0, n)),
            scales,
            scales,
        ],
        out_specs=pl.BlockSpec((None, rows, _TILE), lambda n, s: (s, 0, n)),
        out_shape=jax.ShapeDtypeStruct((splits, rows, out), x.dtype if splits == 1 else jnp.float32),
        compiler_params=parameters(warps=4, stages=3),
        interpret=interpret,
        name="dequant_matmul",
    )(x, weight.words, weight.scale, weight.offset)
    y = y[0] if splits == 1 else jnp.sum(y, axis=0).astype(x.dtype)
    return y[:batch, : weight.shape[0]]
