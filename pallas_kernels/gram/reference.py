"""`Xᵀ X` on XLA: block rows of the lower triangle."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gram.triangle import mirrored

__all__ = ["gram"]

_BLOCKS = 8
"""Block rows: 9/16 of the multiplications of the whole product."""


def gram(x: Float[Array, "rows n"]) -> Float[Array, "n n"]:
    """`Xᵀ X` in float32, exactly symmetric."""
    n = x.shape[1]
    width = max(1, -(-n // _BLOCKS))
    parts = []
    for start in range(0, n, width):
        end = min(start + width, n)
        own = jnp.matmul(x[:, start:end].T, x[:, :end], precision="highest", preferred_element_type=jnp.float32)
        parts.append(jnp.pad(own, ((0, 0), (0, n - end))))
    return mirrored(jnp.concatenate(parts, axis=0))
