"""Hadamard transform on a TPU: 128 lanes at a time by the matrix unit, the rest as butterflies of whole lane tiles.

`H_{128 m} = H_m ⊗ H_128`: every tile of 128 lanes is multiplied by H_128, then log2(m) rounds of sums and differences
combine the m tiles of a vector in place, without moving a value between lanes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.hadamard.reference import sylvester

__all__ = ["hadamard", "obstacle"]

_LANES = 128
_VALUES = 2**17
"""Values of a block: half a mebibyte of float32 in, as much out, both twice for the pipeline."""


def obstacle(block: int, dtype: Any) -> str | None:
    """The reason why the transform of order `block` cannot run, None when it can."""
    if dtype == jnp.float16:
        return "a TPU has no float16; use float32 or bfloat16"
    if not _LANES <= block <= 2**15:
        return f"it combines whole tiles of {_LANES} lanes in VMEM, orders {_LANES} to {2**15}, found {block}"
    return None


def _kernel(x_ref: Any, h_ref: Any, y_ref: Any, *, block: int) -> None:
    tiles = block // _LANES
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None  # ±1 and bfloat16 multiply exactly
    scale = 1 / math.sqrt(block)
    for start in range(0, x_ref.shape[1], block):
        parts = []
        for i in range(tiles):
            part = x_ref[:, start + i * _LANES : start + (i + 1) * _LANES]
            parts.append(jnp.dot(part, h_ref[...], precision=precision, preferred_element_type=jnp.float32) * scale)
        stride = 1
        while stride < tiles:
            for i in range(tiles):
                if not i & stride:
                    a, b = parts[i], parts[i + stride]
                    parts[i], parts[i + stride] = a + b, a - b
            stride *= 2
        for i, part in enumerate(parts):
            y_ref[:, start + i * _LANES : start + (i + 1) * _LANES] = part.astype(y_ref.dtype)


def hadamard(x: Float[Array, "*batch n"], block: int, interpret: Any = False) -> Float[Array, "*batch n"]:
    """`x (I ⊗ H_block) / √block`, accumulated in float32; `obstacle` says beforehand what cannot run."""
    n = x.shape[-1]
    vectors = x.size // n
    columns = next(c for c in range(max(block, min(n, 1024) // block * block), 0, -block) if n % c == 0)
    least = 32 // x.dtype.itemsize  # sublanes of a tile
    rows = max(least, min(_VALUES // columns, 256) // least * least)
    rows = min(rows, -(-vectors // least) * least)
    padded = -(-vectors // rows) * rows
    own = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    y = pl.pallas_call(
        functools.partial(_kernel, block=block),
        grid=(padded // rows, n // columns),
        in_specs=[own, pl.BlockSpec((_LANES, _LANES), lambda i, j: (0, 0))],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct((padded, n), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="hadamard",
    )(jnp.pad(x.reshape(vectors, n), ((0, padded - vectors), (0, 0))), jnp.asarray(sylvester(_LANES), x.dtype))
    return y[:vectors].reshape(x.shape)
