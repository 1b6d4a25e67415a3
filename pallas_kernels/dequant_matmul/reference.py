"""Decode-then-multiply on XLA: the oracle, the fallback, and the implementation for many rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul.decode import block_weights, scale_line
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, PackedMatrix

__all__ = ["dequantize", "matmul"]


def dequantize(weight: PackedMatrix) -> Float[Array, "in out"]:
    """Wᵀ in float32, without its padding."""
    blocks, _, lanes = weight.words.shape
    parts = [weight.words[:, i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
    following = jnp.roll(parts[0].reshape(blocks, ROWS, -1, 16), -1, axis=3).reshape(parts[0].shape)
    scale, offset = (jnp.repeat(x, weight.blocks_per_scale, axis=0)[:blocks] for x in (weight.scale, weight.offset))

    def scales(j: int) -> tuple[jnp.ndarray, jnp.ndarray]:
        line = scale_line(weight, j)
        return scale[:, line : line + 1], offset[:, line : line + 1]

    def lookup(first: int, _: int, index: jnp.ndarray) -> jnp.ndarray:
        return jnp.take(weight.table.reshape(-1), index.astype(jnp.int32) + first, mode="clip")

    slabs = list(block_weights(parts, following, weight, scales, lookup))
    rows = jnp.stack(slabs, axis=1 if weight.code is None else 2).reshape(blocks * BLOCK, lanes)
    return rows[: weight.shape[1], : weight.shape[0]]


def matmul(x: Float[Array, "batch in"], weight: PackedMatrix) -> Float[Array, "batch out"]:
    """`x Wᵀ`: W decoded in float32 and rounded to the dtype of x, products summed in float32."""
    dense = dequantize(weight).astype(x.dtype)
    return jnp.matmul(x, dense, precision="highest", preferred_element_type=jnp.float32).astype(x.dtype)
