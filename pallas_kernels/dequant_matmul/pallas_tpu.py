"""Streaming dequantise-and-multiply on a TPU: packed words pass through VMEM once, x stays there.

The grid is (tiles of outputs, blocks of 512 inputs), the inputs innermost. A step decodes a `[512, tile]` block of Wᵀ
slab by slab with shifts of whole registers and multiplies it on the matrix unit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dequant_matmul.decode import block_weights, by_slabs, scale_line, static
from pallas_kernels.dequant_matmul.layout import BLOCK, LANES, ROWS, PackedMatrix

__all__ = ["CANDIDATES", "DEFAULT", "key", "matmul", "obstacle"]

_X_BYTES = 4 << 20
DEFAULT = {"tile": 1024}
"""Outputs of a step at most."""
CANDIDATES = tuple({"tile": tile} for tile in (256, 512, 1024, 2048))
"""The blocks that tuning tries."""
_LOOKUP_TILE = 256
"""Outputs of a step at most for a code with a table, whose look-ups are written out for every 128 lanes."""


def obstacle(batch: int, dtype: Any, weight: PackedMatrix) -> str | None:
    """The reason why the product with `batch` rows of `dtype` cannot run, None when it can."""
    for name, own in (("x", dtype), ("scales", weight.scale.dtype), ("offsets", weight.offset.dtype)):
        if own == jnp.float16:
            return f"a TPU has no float16, found {name} of it; use float32 or bfloat16"
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    if 16 * jnp.dtype(dtype).itemsize * weight.padded[1] > _X_BYTES:
        return f"16 rows of {weight.padded[1]} inputs do not fit its share of VMEM, {_X_BYTES >> 20} MiB"
    return None


def key(weight: PackedMatrix) -> str:
    """Key of the tuned blocks: the code, its bits, the tiles of 1024 outputs and inputs."""
    shape = "x".join(str(-(-n // 1024)) for n in weight.padded)
    return f"{weight.code or 'grid'} {weight.bits} bits, {shape}"


def _following(piece: Array) -> Array:
    """The value 16-lane-circularly one lane to the right: the next row of the tile."""
    lanes = piece.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1)
    return jnp.where(lane % 16 == 15, pltpu.roll(piece, 15, 1), pltpu.roll(piece, lanes - 1, 1))


def _lookup(table_ref: Any, first: int, count: int, index: Array) -> Array:
    """Entry `first + index` of a table in rows of 128: one exchange of lanes per row, the right one selected."""
    lines = -(-(first % LANES + count) // LANES)
    found = []
    for start in range(0, index.shape[1], LANES):
        own = index[:, start : start + LANES].astype(jnp.int32) + first % LANES
        lane, line = own & (LANES - 1), own >> (LANES.bit_length() - 1)
        entry = None
        for i in range(lines):
            row = first // LANES + i
            entries = jnp.broadcast_to(table_ref[row : row + 1, :], own.shape)
            there = jnp.take_along_axis(entries, lane, axis=1, mode="promise_in_bounds")
            entry = there if entry is None else jnp.where(line == i, there, entry)
        assert entry is not None
        found.append(entry)
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def _kernel(*refs: Any, weight: PackedMatrix) -> None:
    x_ref, words_ref, scale_ref, offset_ref, *table_ref, y_ref, sum_ref = refs
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def scales(j: int) -> tuple[Array, Array]:
        line = scale_line(weight, j)
        return scale_ref[line : line + 1, :], offset_ref[line : line + 1, :]

    parts = [words_ref[i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
    following = _following(parts[0]) if weight.L else None
    lookup = functools.partial(_lookup, table_ref[0]) if table_ref else None
    slabs = [w.astype(x_ref.dtype) for w in block_weights(parts, following, weight, scales, lookup)]
    sum_ref[...] += jnp.dot(
        x_ref[block],
        jnp.concatenate(slabs, axis=0),
        precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def matmul(
    x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False, blocks: Mapping[str, int] | None = None
) -> Float[Array, "batch out"]:
    """`x Wᵀ`, W decoded in float32 and rounded to the dtype of x, summed in float32; see `obstacle`.

    `blocks` is as DEFAULT; None takes what was tuned for the device.
    """
    batch = x.shape[0]
    out, padded = weight.padded
    count = padded // BLOCK
    rows = -(-batch // 16) * 16
    own = tuned.blocks("dequant_matmul", key(weight), DEFAULT) if blocks is None else {**DEFAULT, **blocks}
    most = own["tile"] if weight.table is None else min(own["tile"], _LOOKUP_TILE)
    tile = next(t for t in range(most, 0, -LANES) if out % t == 0)
    table = [] if weight.table is None else [weight.table]
    per = weight.blocks_per_scale
    x = by_slabs(x, weight, rows)
    scales = pl.BlockSpec((None, weight.scale.shape[1], tile), lambda n, k: (k // per, 0, n))
    y = pl.pallas_call(
        functools.partial(_kernel, weight=static(weight)),
        grid=(out // tile, count),
        in_specs=[
            pl.BlockSpec((count, rows, BLOCK), lambda n, k: (0, 0, 0)),
            pl.BlockSpec((None, weight.bits * ROWS, tile), lambda n, k: (k, 0, n)),
            scales,
            scales,
            *(pl.BlockSpec(t.shape, lambda n, k: (0, 0)) for t in table),
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda n, k: (0, n)),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, tile), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="dequant_matmul",
    )(x, weight.words, weight.scale, weight.offset, *table)
    return y[:batch, : weight.shape[0]]
