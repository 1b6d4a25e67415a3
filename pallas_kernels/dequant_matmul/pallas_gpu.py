"""Streaming dequantise-and-multiply on a GPU: every program owns a tile of outputs and reads its packed words once.

A slab of 16 inputs is decoded in registers, by one shift, one mask and one multiply-add per weight, and multiplied at
once: by tensor cores for 2 to 16 rows, by plain multiply-adds for one. Where tiles are too few to fill the device the
inputs are split too, and the partial sums, a few percent of the weights' bytes at most, are added by XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dequant_matmul.decode import block_weights, by_slabs, scale_line, static
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, PackedMatrix
from pallas_kernels.triton import parameters, unavailable

__all__ = ["CANDIDATES", "DEFAULT", "key", "matmul", "obstacle"]

DEFAULT = {"tile": 64, "warps": 4, "stages": 3, "programs": 512}
"""Outputs of a program, its warps and pipeline stages, and programs to aim for: about four per multiprocessor."""
CANDIDATES = tuple(
    {"tile": tile, "warps": warps, "stages": stages, "programs": programs}
    for tile, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))
    for stages in (1, 3)
    for programs in (264, 528, 1056)
)
"""What tuning tries."""


def key(rows: int, weight: PackedMatrix) -> str:
    """Under which tuned blocks are kept: code, bits, one row or several, tiles of 1024 outputs and inputs."""
    shape = "x".join(str(-(-n // 1024)) for n in weight.padded)
    return f"{weight.code or 'grid'} {weight.bits} bits, {'one row' if rows == 1 else '16 rows'}, {shape}"


def obstacle(batch: int, weight: PackedMatrix) -> str | None:
    """Why the product with `batch` rows cannot run, None when it can."""
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    return unavailable()


def _splits(rows: int, weight: PackedMatrix, tile: int, programs: int) -> int:
    """Parts of the inputs: enough programs, equal parts, partial sums written and read at most 5% of the weights."""
    out, padded = weight.padded
    blocks = padded // BLOCK
    most = min(programs // (out // tile), weight.nbytes // (20 * 8 * rows * out))
    return max([s for s in range(1, blocks + 1) if blocks % s == 0 and s <= most], default=1)


def _kernel(*refs: Any, weight: PackedMatrix, tile: int) -> None:
    x_ref, words_ref, scale_ref, offset_ref, *table_ref, y_ref = refs
    rows = x_ref.shape[1]
    blocks = words_ref.shape[0] // pl.num_programs(1)
    first = pl.program_id(1) * blocks
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, tile), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, tile), 0)

    def lookup(first: int, _: int, index: Array) -> Array:
        return table_ref[0][index.astype(jnp.int32) + first]  # from the first cache

    def step(i: Array, total: Array) -> Array:
        block = first + i
        parts = [words_ref[block, i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
        following = None
        if weight.L:  # the next row of every tile: in the first cache by now
            following = words_ref[block, row, (lane & -16) | ((lane + 1) & 15)]
        group = jax.lax.div(block, jnp.int32(weight.blocks_per_scale))
        kept: dict[int, tuple[Array, Array]] = {}

        def scales(j: int) -> tuple[Array, Array]:
            line = scale_line(weight, j)
            if line not in kept:
                kept[line] = scale_ref[group, line : line + 1, :], offset_ref[group, line : line + 1, :]
            return kept[line]

        for j, own in enumerate(block_weights(parts, following, weight, scales, lookup)):
            weights = own.astype(x_ref.dtype)
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


def matmul(
    x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False, blocks: Mapping[str, int] | None = None
) -> Float[Array, "batch out"]:
    """`x Wᵀ`, W decoded in float32 and rounded to the dtype of x, summed in float32; see `obstacle`.

    `blocks` is as DEFAULT; None takes what was tuned for the device.
    """
    batch = x.shape[0]
    out, padded = weight.padded
    count = padded // BLOCK
    rows = 1 if batch == 1 else 16
    own = tuned.blocks("dequant_matmul", key(rows, weight), DEFAULT) if blocks is None else {**DEFAULT, **blocks}
    tile = own["tile"]
    splits = _splits(rows, weight, tile, own["programs"])
    scales = pl.BlockSpec((*weight.scale.shape[:2], tile), lambda n, s: (0, 0, n))
    table = [] if weight.table is None else [weight.table.reshape(-1)]
    y = pl.pallas_call(
        functools.partial(_kernel, weight=static(weight), tile=tile),
        grid=(out // tile, splits),
        in_specs=[
            pl.BlockSpec((count, rows, BLOCK), lambda n, s: (0, 0, 0)),
            pl.BlockSpec((count, weight.bits * ROWS, tile), lambda n, s: (0, 0, n)),
            scales,
            scales,
            *(pl.BlockSpec(t.shape, lambda n, s: (0,)) for t in table),
        ],
        out_specs=pl.BlockSpec((None, rows, tile), lambda n, s: (s, 0, n)),
        out_shape=jax.ShapeDtypeStruct((splits, rows, out), x.dtype if splits == 1 else jnp.float32),
        compiler_params=parameters(warps=own["warps"], stages=own["stages"]),
        interpret=interpret,
        name="dequant_matmul",
    )(by_slabs(x, weight, rows), weight.words, weight.scale, weight.offset, *table)
    y = y[0] if splits == 1 else jnp.sum(y, axis=0).astype(x.dtype)
    return y[:batch, : weight.shape[0]]
