"""Decode-then-multiply on XLA: the oracle, the fallback, and what runs for many rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS, SLABS, PackedMatrix, slab_weights

__all__ = ["dequantize", "matmul"]


def dequantize(weight: PackedMatrix) -> Float[Array, "in out"]:
    """Wᵀ in float32, without its padding."""
    blocks = weight.words.shape[0]
    parts = [weight.words[:, i * ROWS : (i + 1) * ROWS, :] for i in range(weight.bits)]
    scale, offset = (jnp.repeat(x, weight.blocks_per_scale, axis=0)[:blocks] for x in (weight.scale, weight.offset))
    span = BLOCK // scale.shape[1]  # inputs per scale within a block
    slabs = []
    for j in range(SLABS):
        own = slice(j * ROWS // span, j * ROWS // span + 1)
        slabs.append(slab_weights(parts, weight.bits, j, scale[:, own], offset[:, own]))
    rows = jnp.stack(slabs, axis=1).reshape(blocks * BLOCK, -1)
    return rows[: weight.shape[1], : weight.shape[0]]


def matmul(x: Float[Array, "batch in"], weight: PackedMatrix) -> Float[Array, "batch out"]:
    """`x Wᵀ`: W decoded in float32 and rounded to the dtype of x, products summed in float32."""
    dense = dequantize(weight).astype(x.dtype)
    return jnp.matmul(x, dense, precision="highest", preferred_element_type=jnp.float32).astype(x.dtype)
