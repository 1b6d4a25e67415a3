"""The tiles of a lower triangle as a rectangle, so that a grid has no idle programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["grid_of", "mirrored", "tile_of"]


def grid_of(tiles: int) -> tuple[int, int]:
    """The rectangle that the `tiles (tiles + 1) / 2` tiles of a lower triangle fill."""
    odd = tiles % 2
    return (tiles + odd) // 2, tiles + 1 - odd


def tile_of(p: Any, q: Any, tiles: int) -> tuple[Any, Any]:
    """Row and column, row ≥ column, of the tile at (p, q): every tile once.

    Row `tiles − 1 − p` of the triangle, with `tiles − p` tiles, and the short row `p − odd` fill a row together.
    """
    long, short = tiles - p, p - tiles % 2
    if isinstance(q, int):
        return (long - 1, q) if q < long else (short, q - long)
    inside = q < long
    return jax.lax.select(inside, long - 1, short), jax.lax.select(inside, q, q - long)


def mirrored(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric matrix with this lower triangle; what stands above it is ignored, even if not finite."""
    at = jnp.arange(lower.shape[0])
    return jnp.where(at[:, None] >= at[None, :], lower, lower.T)
