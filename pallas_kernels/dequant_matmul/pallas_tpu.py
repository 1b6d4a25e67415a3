"""Streaming dequantise-and-multiply on a TPU: packed words pass through VMEM once, x stays there.

The grid is (tiles of outputs, blocks of 512 inputs), the inputs innermost. A step decodes a `[512, tile]` block of Wᵀ
slab by slab with shifts of whole registers and multiplies it on the matrix unit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul.decode import by_slabs, scale_line, slab_weights, static
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix

__all__ = ["matmul", "obstacle"]

_X_BYTES = 4 << 20
_TILES = (1024, 512, 256, 128)


def obstacle(batch: int, dtype: Any, weight: PackedMatrix) -> str | None:
    """Why the product with `batch` rows of `dtype` cannot run, None when it can."""
    for name, own in (("x", dtype), ("scales", weight.scale.dtype), ("offsets", weight.offset.dtype)):
        if own == jnp.float16:
            return f"a TPU has no float16, found {name} of it; use float32 or bfloat16"
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    if 16 * jnp.dtype(dtype).itemsize * weight.padded[1] > _X_BYTES:
        return f"16 rows of {weight.padded[1]} inputs do not fit its share of VMEM, {_X_BYTES >> 20} MiB"
    return None


def _following(piece: Array) -> Array:
    """The value 16-lane-circularly one lane to the right: the next row of the tile."""
    lanes = piece.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
    return jnp.where(lane % 16 == 15, pltpu.roll(piece, 15, 1), pltpu.roll(piece, lanes - 1, 1))


def _kernel(
    x_ref: Any, words_ref: Any, scale_ref: Any, offset_ref: Any, y_ref: Any, sum_ref: Any, *, weight: PackedMatrix
) -> None:
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    parts = [words_ref[i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
    following = None if weight.code is None else _following(parts[0])
    slabs = []
    for j in range(SLABS):
        line = scale_line(weight, j)
        own = slice(line, line + 1)
        weights = slab_weights(parts, following, weight, j, scale_ref[own, :], offset_ref[own, :])
        slabs.append(weights.astype(x_ref.dtype))
    sum_ref[...] += jnp.dot(
        x_ref[block],
        jnp.concatenate(slabs, axis=0),
        precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def matmul(x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False) -> Float[Array, "batch out"]:
    """`x Wᵀ`, W decoded in float32 and rounded to the dtype of x, summed in float32; see `obstacle`."""
    batch = x.shape[0]
    out, padded = weight.padded
    blocks = padded // BLOCK
    rows = -(-batch // 16) * 16
    tile = next(t for t in _TILES if out % t == 0)
    per = weight.blocks_per_scale
    x = by_slabs(x, weight, rows)
    scales = pl.BlockSpec((None, weight.scale.shape[1], tile), lambda n, k: (k // per, 0, n))
    y = pl.pallas_call(
        functools.partial(_kernel, weight=static(weight)),
        grid=(out // tile, blocks),
        in_specs=[
            pl.BlockSpec((blocks, rows, BLOCK), lambda n, k: (0, 0, 0)),
            pl.BlockSpec((None, weight.bits * ROWS, tile), lambda n, k: (k, 0, n)),
            scales,
            scales,
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda n, k: (0, n)),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="dequant_matmul",
    )(x, weight.words, weight.scale, weight.offset)
    return y[:batch, : weight.shape[0]]
