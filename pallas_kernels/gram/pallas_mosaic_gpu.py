"""`Xᵀ X` on Hopper through Mosaic GPU: tiles of the lower triangle by wgmma, operands by TMA.

bfloat16 goes in as it is. float32 is a sum of three bfloat16, and the six products whose terms are not below float32's
own rounding are summed: six times the work, still on the tensor cores. The left operand is Xᵀ, transposed by XLA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gram.triangle import grid_of, mirrored, tile_of
from pallas_kernels.mosaic_gpu import parameters, plgpu, tiled, unavailable

__all__ = ["gram", "obstacle"]

TILE = 128
DEPTH = {1: 64, 3: 32}
"""Rows of X in a step by terms: what four or two steps of operands and the sums leave room for in shared memory."""
STAGES = {1: 4, 3: 2}


def obstacle(dtype: Any) -> str | None:
    """The reason why the product cannot run here, None when it can."""
    return unavailable()


def _body(left_gmem: Any, right_gmem: Any, y_gmem: Any, *, y_smem: Any, tiles: int, terms: int, steps: int) -> None:
    depth = DEPTH[terms]
    i, j = tile_of(jax.lax.axis_index("p"), jax.lax.axis_index("q"), tiles)
    pairs = [(a, b) for a in range(terms) for b in range(terms - a)]

    def product(acc: Any) -> Array:
        def step(_: Any, left: Any, right: Any) -> None:
            for a, b in pairs:
                plgpu.wgmma(acc, left.at[a], right.at[b])
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # a barrier: no warp still reads the operands when they are overwritten

        plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec((terms, TILE, depth), lambda k: (0, i, k), transforms=tiled(2, depth)),
                plgpu.BlockSpec((terms, depth, TILE), lambda k: (0, k, j), transforms=tiled(2, depth)),
            ],
            max_concurrent_steps=STAGES[terms],
        )(left_gmem, right_gmem)
        return acc[...]

    y_smem[...] = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)])
    plgpu.wait_smem_to_gmem(0)


def gram(x: Float[Array, "rows n"], interpret: Any = None) -> Float[Array, "n n"]:
    """`Xᵀ X` in float32, exactly symmetric."""
    rows, n = x.shape
    terms = 1 if x.dtype == jnp.bfloat16 else 3
    x = jnp.pad(x, ((0, -rows % DEPTH[terms]), (0, -n % TILE)))
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(terms):
        # not a conversion there and back, which XLA takes out where it may be more precise than asked for
        rounded = jax.lax.reduce_precision(rest, 8, 7)
        parts.append(rounded.astype(jnp.bfloat16))
        rest = rest - rounded
    right = jnp.stack(parts)
    tiles = x.shape[1] // TILE
    y = plgpu.kernel(
        functools.partial(_body, tiles=tiles, terms=terms, steps=x.shape[0] // DEPTH[terms]),
        out_type=jax.ShapeDtypeStruct((x.shape[1], x.shape[1]), jnp.float32),
        grid=grid_of(tiles),
        grid_names=("p", "q"),
        scratch_types={"y_smem": plgpu.SMEM((TILE, TILE), jnp.float32, transforms=tiled(4, TILE))},
        compiler_params=parameters(),
        interpret=interpret,
        kernel_name="gram",
    )(right.swapaxes(1, 2), right)
    return mirrored(y)[:n, :n]
