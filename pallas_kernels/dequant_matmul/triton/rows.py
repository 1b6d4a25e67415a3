"""3 to 16 rows of a product on a GPU: decoded weights go to the tensor cores, 16 inputs in a product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.dequant_matmul import trellis
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, planes
from pallas_kernels.dequant_matmul.triton.program import Program
from pallas_kernels.dequant_matmul.triton.values import CENTRE

__all__ = ["code", "grid"]


def _dot(x: Array, weights: Array) -> Array:
    return jax.lax.dot(x, weights, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def grid(x_ref: Any, own: Program) -> Array:
    """`x Wᵀ` of a scalar grid, float32 `[16, tile]`. With groups W is scaled and rounded to the dtype of x."""
    weight, dtype = own.weight, x_ref.dtype
    widths, grouped, rows = planes(weight.bits), weight.group is not None, x_ref.shape[0]

    def step(block: Array, carry: Any) -> Any:
        total, inputs = carry
        pieces, kept = own.pieces(block, 0), [{} for _ in range(weight.bits)]
        for j in range(SLABS):
            x = x_ref[:, pl.ds(block * BLOCK + ROWS * j, ROWS)]
            code = None
            for n, width in enumerate(widths):
                piece = sum(widths[:n]) + j % width
                part = own.decoder.code_at(pieces[piece], j - j % width, width, kept[piece])
                factor = jnp.full(part.shape, 2.0 ** sum(widths[:n]), jnp.float32)
                code = part if code is None else own.ops.multiply_add(part, factor, code)
            assert code is not None
            if grouped:
                scale, offset = (own.scale(which, block, ROWS * j, ROWS) for which in (0, 1))
                code = own.ops.multiply_add(code, scale, offset)
            else:  # the sums of x, in all columns
                inputs = inputs + _dot(x, jnp.ones((ROWS, 16), dtype))
            total = total + _dot(x, code.astype(dtype))
        return total, inputs

    start = (jnp.zeros((rows, own.tile), jnp.float32), jnp.zeros((rows, 16), jnp.float32))
    total, inputs = jax.lax.fori_loop(own.first, own.end, step, start)
    if grouped:
        return total
    whole = jnp.max(inputs, axis=1, keepdims=True)
    return total * own.scale(0, jnp.int32(0), 0, 1) + whole * own.scale(1, jnp.int32(0), 0, 1)


def code(x_ref: Any, own: Program) -> Array:
    """`x Wᵀ` of a trellis or a lattice, likewise; values are rounded to the dtype of x, mul1's to bfloat16 directly."""
    weight, rows, dtype = own.weight, x_ref.shape[1], x_ref.dtype
    centred = weight.code == "mul1" and dtype == jnp.bfloat16

    def step(block: Array, carry: Any) -> Any:
        total, inputs = carry
        value = own.decoder.slabs(own.pieces(block, 0), weight, centred)
        for j in range(SLABS):
            x = x_ref[block, :, j * ROWS : (j + 1) * ROWS]
            if centred:
                # before the product with weights: after it Triton has every warp decode all of them
                inputs = inputs + _dot(x, jnp.ones((ROWS, 16), dtype))
            total = total + _dot(x, value(j).astype(dtype))
        return total, inputs

    start = (jnp.zeros((rows, own.tile), jnp.float32), jnp.zeros((rows, 16), jnp.float32))
    total, inputs = jax.lax.fori_loop(own.first, own.end, step, start)
    unit = trellis.unit(weight.code) if weight.code and weight.table is None else 1.0
    if centred:
        unit, shift = trellis.MUL1
        total = total + jnp.max(inputs, axis=1, keepdims=True) * np.float32(CENTRE + 1024 + shift / unit)
    return total * (own.scale(0, jnp.int32(0), 0, 1) * np.float32(unit))
