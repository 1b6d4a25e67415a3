"""`Xᵀ X` on a TPU: tiles of the lower triangle, sums in VMEM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.gram.triangle import grid_of, mirrored, tile_of

__all__ = ["gram", "obstacle"]

_LANES = 128


def obstacle(dtype: Any) -> str | None:
    """The reason why the product cannot run, None when it can."""
    return "a TPU has no float16; use float32 or bfloat16" if dtype == jnp.float16 else None


def _kernel(a_ref: Any, b_ref: Any, y_ref: Any, sum_ref: Any) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jax.lax.dot_general(
        a_ref[...],
        b_ref[...],
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a_ref.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...]


def gram(x: Float[Array, "rows n"], interpret: Any = False, tile: int = 512, depth: int = 512) -> Float[Array, "n n"]:
    """`Xᵀ X` in float32, exactly symmetric; tiles of at most `tile` columns, `depth` rows a step."""
    rows, n = x.shape
    tile = min(tile, -(-n // _LANES) * _LANES)
    depth = min(depth, -(-rows // 16) * 16)
    x = jnp.pad(x, ((0, -rows % depth), (0, -n % tile)))
    tiles = x.shape[1] // tile
    y = pl.pallas_call(
        _kernel,
        grid=(*grid_of(tiles), x.shape[0] // depth),
        in_specs=[pl.BlockSpec((depth, tile), lambda p, q, k, i=i: (k, tile_of(p, q, tiles)[i])) for i in (0, 1)],
        out_specs=pl.BlockSpec((tile, tile), lambda p, q, k: tile_of(p, q, tiles)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], x.shape[1]), jnp.float32),
        scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="gram",
    )(x, x)
    return mirrored(y)[:n, :n]
