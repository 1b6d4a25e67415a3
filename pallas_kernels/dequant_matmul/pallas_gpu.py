"""Streaming dequantise-and-multiply on a GPU: every program owns a tile of outputs and reads its packed words once.

One or two rows are multiplied by multiply-adds (`triton.few_rows`), 3 to 16 by the tensor cores (`triton.rows`).

Where tiles are too few to fill the device the inputs are split too; the partial sums, a tenth of the weights' bytes at
most, are added by XLA. Scales of whole rows are applied to the sums, not to weights.
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
from pallas_kernels.dequant_matmul.decode import by_slabs, static
from pallas_kernels.dequant_matmul.layout import BLOCK, PackedMatrix
from pallas_kernels.dequant_matmul.triton import few_rows
from pallas_kernels.dequant_matmul.triton import rows as several_rows
from pallas_kernels.dequant_matmul.triton.program import Program
from pallas_kernels.triton import Instructions, parameters, unavailable

__all__ = ["DEFAULT", "MULTIPLIED", "candidates", "key", "matmul", "obstacle", "rows_of"]

DEFAULT = {"tile": 128, "strips": 2, "warps": 8, "stages": 3, "programs": 264}
"""Outputs of a program, strips of a tile, warps, pipeline stages, programs to aim for: two per multiprocessor."""
ROWS_DEFAULT = {"tile": 64, "strips": 1, "warps": 4, "stages": 3, "programs": 528}
"""`DEFAULT` for 3 to 16 rows."""
MULTIPLIED = 2
"""Rows up to which weights are multiplied by multiply-adds: with more the tensor cores are faster (measured, H200)."""
CANDIDATES = tuple(
    {"tile": tile, "strips": strips, "warps": warps, "programs": programs}
    for programs in (264, 528, 132)
    for tile, strips, warps in ((128, 4, 8), (128, 2, 8), (64, 2, 8), (128, 2, 16), (64, 1, 8), (32, 1, 4), (64, 2, 4))
)
"""The blocks that tuning tries for few rows."""
ROWS_CANDIDATES = tuple(
    {"tile": tile, "warps": warps, "stages": stages, "programs": programs}
    for programs in (264, 528)
    for tile, warps in ((64, 4), (32, 4), (32, 2), (128, 4), (128, 8))
    for stages in (3, 2)
)
"""The blocks that tuning tries for 3 to 16 rows."""


def key(batch: int, weight: PackedMatrix) -> str:
    """Key of the tuned blocks: code, bits, rows, tiles of 1024 outputs and inputs."""
    shape = "x".join(str(-(-n // 1024)) for n in weight.padded)
    rows = {1: "one row", 16: "16 rows"}.get(rows_of(batch), "2 rows")
    return f"{weight.code or 'grid'} {weight.bits} bits, {rows}, {shape}"


def candidates(batch: int) -> tuple[dict[str, int], ...]:
    """The blocks that tuning tries for `batch` rows."""
    return CANDIDATES if batch <= MULTIPLIED else ROWS_CANDIDATES


def rows_of(batch: int) -> int:
    """The rows that a program computes for `batch`: as many, or those of a tensor core's product."""
    return batch if batch <= MULTIPLIED else 16


def obstacle(batch: int, weight: PackedMatrix) -> str | None:
    """The reason why the product with `batch` rows cannot run, None when it can."""
    if batch > 16:
        return f"it streams the weights for at most 16 rows, found {batch}"
    return unavailable()


def _blocks_of_program(rows: int, weight: PackedMatrix, tile: int, programs: int) -> int:
    """Blocks of inputs of a program: few for enough programs, and for partial sums of a tenth of the weights' bytes."""
    out, padded = weight.padded
    blocks = padded // BLOCK
    parts = max(1, min(programs // (out // tile), weight.nbytes // (10 * 4 * rows * out), blocks))
    return -(-blocks // parts)


def _kernel(*refs: Any, weight: PackedMatrix, ops: Instructions, strips: int, blocks: int) -> None:
    x_ref, words_ref, scale_ref, offset_ref, *table, y_ref = refs
    scales, entries = (scale_ref, offset_ref), table[0] if table else None
    own = Program(words_ref, scales, entries, weight, ops, strips, blocks)
    if y_ref.shape[0] > MULTIPLIED:
        y_ref[...] = (several_rows.grid if weight.code is None else several_rows.code)(x_ref, own).astype(y_ref.dtype)
        return
    found = (few_rows.grid if weight.code is None else few_rows.code)(x_ref, own)
    for strip, some in enumerate(found):
        for row, y in enumerate(some):
            y_ref[row : row + 1, strip * own.lanes : (strip + 1) * own.lanes] = y.astype(y_ref.dtype)


def _inputs(x: Array, weight: PackedMatrix, rows: int) -> Array:
    """x as the bodies read it: padded, and for 16 rows of a code by slabs. Few rows are read as they are."""
    if rows > MULTIPLIED and weight.code is not None:
        return by_slabs(x, weight, rows)
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, weight.padded[1] - x.shape[1])))


def matmul(
    x: Float[Array, "batch in"], weight: PackedMatrix, interpret: Any = False, blocks: Mapping[str, int] | None = None
) -> Float[Array, "batch out"]:
    """`x Wᵀ` in the dtype of x, summed in float32; see `obstacle`.

    W is not rounded for few rows, nor for scalar grids with scales of whole rows; else it is, to the dtype of x.
    `blocks` is as DEFAULT; None takes what was tuned for the device.
    """
    batch, out = x.shape[0], weight.padded[0]
    rows = rows_of(batch)
    default = DEFAULT if rows <= MULTIPLIED else ROWS_DEFAULT
    own = tuned.blocks("dequant_matmul", key(batch, weight), default) if blocks is None else {**default, **blocks}
    tile = own["tile"]
    each = _blocks_of_program(rows, weight, tile, own["programs"])
    parts = -(-weight.words.shape[0] // each)
    scales = pl.BlockSpec((*weight.scale.shape[:2], tile), lambda n, s: (0, 0, n))
    table = [] if weight.table is None else [weight.table.reshape(-1)]
    inputs = _inputs(x, weight, rows)
    y = pl.pallas_call(
        functools.partial(
            _kernel,
            weight=static(weight),
            ops=Instructions(interpret),
            strips=own["strips"] if rows <= MULTIPLIED else 1,
            blocks=each,
        ),
        grid=(out // tile, parts),
        in_specs=[
            pl.BlockSpec(inputs.shape, lambda n, s: (0,) * inputs.ndim),
            pl.BlockSpec((*weight.words.shape[:2], tile), lambda n, s: (0, 0, n)),
            scales,
            scales,
            *(pl.BlockSpec(t.shape, lambda n, s: (0,)) for t in table),
        ],
        out_specs=pl.BlockSpec((None, rows, tile), lambda n, s: (s, 0, n)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, out), x.dtype if parts == 1 else jnp.float32),
        compiler_params=parameters(warps=own["warps"], stages=own["stages"] if rows > MULTIPLIED else 1),
        interpret=interpret,
        name="dequant_matmul",
    )(inputs, weight.words, weight.scale, weight.offset, *table)
    y = y[0] if parts == 1 else jnp.sum(y, axis=0).astype(x.dtype)
    return y[:batch, : weight.shape[0]]
