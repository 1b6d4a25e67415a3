"""Hadamard transform on a GPU: `H_{ab} = H_a ⊗ H_b`, so a vector seen as an a × b matrix X becomes `H_a X H_b`.

A program reads one vector (or, up to order 128, a tile of vectors), multiplies it by the small factors and writes it:
two passes over device memory for any order, `a + b` multiply-adds per value.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.hadamard.reference import sylvester
from pallas_kernels.triton import parameters, unavailable

__all__ = ["hadamard", "obstacle"]

_SMALL = 128
"""Orders up to this are one product."""
_ROWS = 64


def obstacle(block: int, dtype: Any) -> str | None:
    """The reason why the transform of order `block` cannot run, None when it can."""
    if not 16 <= block <= 2**15:
        return f"a program's tile has orders 16 to {2**15}, found {block}"
    return unavailable()


def _dot(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _small_kernel(x_ref: Any, h_ref: Any, y_ref: Any, *, scale: float) -> None:
    y_ref[...] = (_dot(x_ref[...], h_ref[...]) * scale).astype(y_ref.dtype)


def _large_kernel(x_ref: Any, left_ref: Any, right_ref: Any, y_ref: Any, *, scale: float) -> None:
    inner = _dot(x_ref[...], right_ref[...]) * scale
    y_ref[...] = _dot(left_ref[...], inner).astype(y_ref.dtype)


def hadamard(x: Float[Array, "*batch n"], block: int, interpret: Any = False) -> Float[Array, "*batch n"]:
    """`x (I ⊗ H_block) / √block`, accumulated in float32; `obstacle` says beforehand what cannot run."""
    scale = 1 / math.sqrt(block)
    vectors = x.size // block
    if block <= _SMALL:
        rows = -(-vectors // _ROWS) * _ROWS
        flat = jnp.pad(x.reshape(vectors, block), ((0, rows - vectors), (0, 0)))
        y = pl.pallas_call(
            functools.partial(_small_kernel, scale=scale),
            grid=(rows // _ROWS,),
            in_specs=[pl.BlockSpec((_ROWS, block), lambda i: (i, 0)), pl.BlockSpec((block, block), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((_ROWS, block), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((rows, block), x.dtype),
            compiler_params=parameters(warps=4),
            interpret=interpret,
            name="hadamard",
        )(flat, jnp.asarray(sylvester(block), x.dtype))
        return y[:vectors].reshape(x.shape)
    left = 1 << (block.bit_length() // 2)
    right = block // left
    own = pl.BlockSpec((None, left, right), lambda i: (i, 0, 0))
    y = pl.pallas_call(
        functools.partial(_large_kernel, scale=scale),
        grid=(vectors,),
        in_specs=[
            own,
            pl.BlockSpec((left, left), lambda i: (0, 0)),
            pl.BlockSpec((right, right), lambda i: (0, 0)),
        ],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct((vectors, left, right), x.dtype),
        compiler_params=parameters(warps=4 if block <= 4096 else 8),
        interpret=interpret,
        name="hadamard",
    )(
        x.reshape(vectors, left, right),
        jnp.asarray(sylvester(left)),
        jnp.asarray(sylvester(right), x.dtype),
    )
    return y.reshape(x.shape)
