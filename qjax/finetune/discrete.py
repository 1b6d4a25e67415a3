"""Mathematics of moving codes: the straight-through estimator, and steps that move a few tiles to other codewords.

Sources: Bengio, Léonard and Courville (1308.3432); PV-Tuning (2405.14852), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling

__all__ = ["downhill", "inner", "largest", "moved", "nearest", "smoothness", "straight_through", "tiled"]


@jax.custom_vjp
def straight_through(latent: Array, value: Array) -> Array:
    """`value`, bit for bit, with the gradient of `latent`: `∂/∂latent = 1`, `∂/∂value = 0`."""
    return value


def _fwd(latent: Array, value: Array) -> tuple[Array, None]:
    return value, None


def _bwd(saved: None, g: Array) -> tuple[Array, None]:
    return g, None


straight_through.defvjp(_fwd, _bwd)


def nearest(weight: Float[Array, "m n"], scaling: Scaling, codebook: Codebook) -> Shaped[Array, "..."]:
    """The codes of the nearest codewords at scales that stay as they are."""
    return codebook.quantize(scaling.to_codebook_units(weight))


def tiled(x: Float[Array, "m n"], tile: tuple[int, int]) -> Float[Array, "tiles rows cols"]:
    """The tiles of a matrix, row by row."""
    rows, cols = tile
    m, n = x.shape
    return x.reshape(m // rows, rows, n // cols, cols).transpose(0, 2, 1, 3).reshape(-1, rows, cols)


def largest(gradient: Float[Array, "m n"], tile: tuple[int, int], count: int) -> Int[Array, " count"]:
    """The tiles whose gradient is largest in `‖·‖`, largest first; of equal ones the first in the matrix."""
    magnitude = jnp.sum(jnp.square(tiled(gradient, tile)), axis=(1, 2))
    return jax.lax.top_k(magnitude, count)[1]


def inner(one: Mapping[str, Array], other: Mapping[str, Array]) -> Array:
    """`⟨a, b⟩` over all arrays of two of the same names."""
    total: Any = sum(jnp.vdot(one[name], other[name]) for name in sorted(one))
    return total


def smoothness(direction: Mapping[str, Array], change: Mapping[str, Array]) -> Array:
    """`L_S = ⟨d, ∇φ(x + d) − ∇φ(x)⟩ / ⟨d, d⟩`: how fast the gradient changes along a direction of the subspace S.

    Exact for a quadratic, `dᵀHd / dᵀd`, which is far below the largest eigenvalue where S is small: there steps of
    `1/L_S` reach other codewords, while those of the whole space round back.
    """
    return inner(direction, change) / inner(direction, direction)


def downhill(gradient: Float[Array, "m n"], tile: tuple[int, int], chosen: Array, kept: Array | int) -> Array:
    """`−∇φ` on the first `kept` chosen tiles and 0 elsewhere, `[m, n]`."""
    m, n = gradient.shape
    rows, cols = tile
    marks = (jnp.arange(chosen.shape[0]) < kept).astype(gradient.dtype)
    mask = jnp.zeros((m // rows) * (n // cols), gradient.dtype).at[chosen].set(marks)
    mask = mask.reshape(m // rows, 1, n // cols, 1)
    return -gradient * jnp.broadcast_to(mask, (m // rows, rows, n // cols, cols)).reshape(m, n)


def moved(
    codes: Shaped[Array, "..."],
    values: Float[Array, "m n"],
    gradient: Float[Array, "m n"],
    rate: Float[Array, ""] | float,
    chosen: Int[Array, " count"],
    kept: Int[Array, ""] | int,
    scaling: Scaling,
    codebook: Codebook,
) -> Shaped[Array, "..."]:
    """The codes after a step of the first `kept` chosen tiles: each becomes the codeword nearest to `x − rate ∇φ`.

    All other codes stay as they are. `values` are the present codewords in units of the weight.
    Source: PV-Tuning, algorithm 2 (the V step on a subspace).
    """
    cols = codebook.tile[1]
    wanted = jnp.take(tiled(scaling.to_codebook_units(values - rate * gradient), codebook.tile), chosen, axis=0)
    found = codebook.quantize(wanted.reshape(-1, cols))
    flat = codes.reshape(-1, *codes.shape[2:])
    old = jnp.take(flat, chosen, axis=0)
    stays = (jnp.arange(chosen.shape[0]) >= kept).reshape(-1, *(1,) * (old.ndim - 1))
    return flat.at[chosen].set(jnp.where(stays, old, found.reshape(old.shape))).reshape(codes.shape)
