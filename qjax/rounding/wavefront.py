"""Two-sided linear feedback over a matrix of tiles, one anti-diagonal at a time.

With `E = W − Ŵ` and `G = E L_in` (L_in unit lower), the target of tile (i, j) is

    T_ij = W_ij + R_ij + Σ_{i'>i} L_out[i', i]ᵀ G_i'j,    R_ij = Σ_{j'>j} E_ij' L_in[j', j],    G_ij = E_ij + R_ij

so a tile needs the tiles to its right and all tiles below them: the anti-diagonals from the bottom right corner are
the largest sets of tiles that can be rounded at once, and there are m/A + n/B − 1 of them. The rows are flipped here,
so that the tiles of an anti-diagonal lie on a diagonal: their rows and their columns are contiguous slices, and
nothing is gathered. A diagonal is worked off in chunks, whose number and whose inner products have the lengths that
are needed: m n (m + n) / 2 multiplications in all, up to the granularity of chunks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.rounding.base import encode_columns, precise

__all__ = ["tile_width", "two_sided_codes"]

_INNER = 512  # columns (rows) of one inner product: long enough for the matrix product, short enough to skip zeros


def _divisor(size: int, unit: int, limit: int) -> int:
    """The largest multiple of `unit` that divides `size` and is at most `limit` (`unit` when there is none)."""
    return max((k for k in range(unit, min(limit, size) + 1, unit) if size % k == 0), default=unit)


def tile_width(codebook: Codebook, block: int, columns: int) -> int:
    """Columns B of a tile of the wavefront: one block for tiles of many rows, else several blocks, swept in turn.

    Wide tiles make the matrix products of cheap codebooks efficient; costly ones (trellises) gain from many tiles.
    """
    return block if codebook.tile[0] > 1 else _divisor(columns, block, 64)


def two_sided_codes(
    weight: Float[Array, "m n"],
    lower_in: Float[Array, "n n"],
    lower_out: Float[Array, "m m"],
    codebook: Codebook,
    scaling: Scaling,
    *,
    rows: int,
    block: int,
    chunk: int = 16,
) -> Array:
    """Codes `[m/r, n/c, ...]` of `Ŵ = Q(W + L_out'ᵀ E L_in' + L_out'ᵀ E + E L_in')`, L' = L − I, for tiles r×c.

    `rows` (A) and `block` are the blocks of L_out and L_in; `chunk` tiles are rounded together, which changes speed and
    memory only. Source: YAQA (2505.22988), the rounding rule, with `G` kept instead of the triple product.
    """
    m, n = weight.shape
    dtype = weight.dtype
    width = tile_width(codebook, block, n)
    count_m, count_n = m // rows, n // width
    c = min(chunk, count_m, count_n)
    pad_m, pad_n = (c - 1) * rows, (c - 1) * width
    inner_n, inner_m = _divisor(n, width, _INNER), _divisor(m, rows, _INNER)
    sub = width // block

    def flip(x: Array) -> Array:
        return jnp.flip(x.reshape(count_m, rows, -1), axis=0).reshape(m, -1)

    def padded(x: Array, value: float = 0.0) -> Array:
        return jnp.pad(x, ((0, pad_m), (0, pad_n)), constant_values=value)

    w = padded(flip(weight))
    l_in = jnp.pad(lower_in - jnp.eye(n, dtype=dtype), ((0, 0), (0, pad_n)))
    corners = lower_in.reshape(count_n, width, count_n, width)[jnp.arange(count_n), :, jnp.arange(count_n), :]
    corners = jnp.pad(corners - jnp.eye(width, dtype=dtype)[None], ((0, c - 1), (0, 0), (0, 0)))
    l_out = flip(flip(lower_out - jnp.eye(m, dtype=dtype)).T).T
    l_out = jnp.pad(l_out, ((0, 0), (0, pad_m)))
    scale, zero = scaling.at(jnp.arange(n), dtype)
    varies = scale.size > 1 or zero.size > 1
    if varies:
        scale = padded(flip(jnp.broadcast_to(scale, (m, n))), 1.0)
        zero = padded(flip(jnp.broadcast_to(zero, (m, n))))
    own = jnp.eye(c, dtype=bool).reshape(c, 1, c, 1)

    def diagonal(x: Array, i: Array, j: Array) -> Array:
        """The tiles (i, j), (i + 1, j + 1), ... of x: `[c, A, B]`."""
        region = jax.lax.dynamic_slice(x, (i * rows, j * width), (c * rows, c * width))
        return jnp.sum(jnp.where(own, region.reshape(c, rows, c, width), 0), axis=2)

    def put(x: Array, i: Array, j: Array, tiles: Array, valid: Array) -> Array:
        at = (i * rows, j * width)
        region = jax.lax.dynamic_slice(x, at, (c * rows, c * width)).reshape(c, rows, c, width)
        region = jnp.where(own & valid.reshape(c, 1, 1, 1), tiles[:, :, None, :], region)
        return jax.lax.dynamic_update_slice(x, region.reshape(c * rows, c * width), at)

    def right(error: Array, i: Array, j: Array) -> Array:
        """`Σ_{j'>j} E_ij' L_in[j', j]` of the c tiles."""

        def add(k: Array, total: Array) -> Array:
            e = jax.lax.dynamic_slice(error, (i * rows, k * inner_n), (c * rows, inner_n)).reshape(c, rows, inner_n)
            feedback = jax.lax.dynamic_slice(l_in, (k * inner_n, j * width), (inner_n, c * width))
            return total + jnp.einsum("iak,kib->iab", e, feedback.reshape(inner_n, c, width), precision=precise)

        return jax.lax.fori_loop(j * width // inner_n, n // inner_n, add, jnp.zeros((c, rows, width), dtype))

    def below(g: Array, i: Array, j: Array) -> Array:
        """`Σ_{i'>i} L_out[i', i]ᵀ G_i'j` of the c tiles."""

        def add(k: Array, total: Array) -> Array:
            feedback = jax.lax.dynamic_slice(l_out, (k * inner_m, i * rows), (inner_m, c * rows))
            part = jax.lax.dynamic_slice(g, (k * inner_m, j * width), (inner_m, c * width))
            return total + jnp.einsum(
                "kia,kib->iab",
                feedback.reshape(inner_m, c, rows),
                part.reshape(inner_m, c, width),
                precision=precise,
            )

        stop = jnp.minimum(((i + c) * rows + inner_m - 1) // inner_m, m // inner_m)
        return jax.lax.fori_loop(0, stop, add, jnp.zeros((c, rows, width), dtype))

    def encode(target: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
        """Values `[c, A, block]` and codes `[c, A/r, block/c, ...]` of one block of every tile."""
        flat = lambda x: x.reshape(c * rows, block) if varies else x.reshape(1, 1)  # noqa: E731
        values, codes = encode_columns(target.reshape(c * rows, block), codebook, flat(scale), flat(zero))
        return values.reshape(c, rows, block), codes.reshape(c, codes.shape[0] // c, *codes.shape[1:])

    def tiles(error: Array, g: Array, i: Array, j: Array) -> tuple[Array, Array, Array]:
        """Round c tiles: (E, G, codes)."""
        own_w, from_right = diagonal(w, i, j), right(error, i, j)
        goal = own_w + below(g, i, j)
        local_scale = diagonal(scale, i, j) if varies else scale
        local_zero = diagonal(zero, i, j) if varies else zero
        if varies:  # outside of the matrix `diagonal` reads padding: harmless values
            local_scale = jnp.where(local_scale == 0, 1, local_scale)
        if sub == 1:
            values, codes = encode(goal + from_right, local_scale, local_zero)
            e = own_w - values
            return e, e + from_right, codes
        corner = jax.lax.dynamic_slice_in_dim(corners, j, c)
        at = lambda x, s: jax.lax.dynamic_slice_in_dim(x, s * block, block, axis=2)  # noqa: E731

        def step(state: tuple[Array, Array], s: Array) -> tuple[tuple[Array, Array], Array]:
            e, g = state
            r = at(from_right, s) + jnp.einsum("iab,ibw->iaw", e, at(corner, s), precision=precise)
            pick = (lambda x: at(x, s)) if varies else (lambda x: x)
            values, codes = encode(at(goal, s) + r, pick(local_scale), pick(local_zero))
            new = at(own_w, s) - values
            place = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, s * block, axis=2)  # noqa: E731
            return (place(e, new), place(g, new + r)), codes

        start = jnp.zeros((c, rows, width), dtype)
        (e, g), codes = jax.lax.scan(step, (start, start), jnp.arange(sub), reverse=True)
        codes = jnp.moveaxis(codes, 0, 2)  # [c, A/r, sub, block/c, ...]
        return e, g, codes.reshape(*codes.shape[:2], -1, *codes.shape[4:])

    shape = jax.eval_shape(lambda e: tiles(e, e, jnp.int32(0), jnp.int32(0))[2], jnp.zeros_like(w))
    steps = count_m + count_n - 1
    store = jnp.zeros((steps, count_m + c - 1, *shape.shape[1:]), shape.dtype)
    offset = jnp.arange(c)

    def diagonal_step(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first, last = jnp.maximum(0, t - count_n + 1), jnp.minimum(count_m - 1, t)

        def one(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            error, g, store = state
            i = first + k * c
            j = count_n - 1 - t + i
            e, own_g, codes = tiles(error, g, i, j)
            valid = i + offset <= last
            index = (t, i) + (jnp.int32(0),) * (codes.ndim - 1)
            store = jax.lax.dynamic_update_slice(store, codes[None], index)
            return put(error, i, j, e, valid), put(g, i, j, own_g, valid), store

        return jax.lax.fori_loop(0, (last - first + c) // c, one, state)

    _, _, store = jax.lax.fori_loop(0, steps, diagonal_step, (jnp.zeros_like(w), jnp.zeros_like(w), store))
    i, j = jnp.arange(count_m - 1, -1, -1).reshape(-1, 1), jnp.arange(count_n).reshape(1, -1)
    return _assemble(store[count_n - 1 - j + i, jnp.broadcast_to(i, (count_m, count_n))])


def _assemble(codes: Any) -> Array:
    """`[M, N, a, b, ...]` of tiles -> `[M a, N b, ...]` of the matrix."""
    big_m, big_n, a, b = codes.shape[:4]
    return jnp.swapaxes(codes, 1, 2).reshape(big_m * a, big_n * b, *codes.shape[4:])
