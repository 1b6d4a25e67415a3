"""Two-sided linear feedback over a matrix of tiles, one anti-diagonal at a time.

With `E = W − Ŵ` and `G = E L_in` (L_in unit lower), the target of tile (i, j) is

    T_ij = W_ij + R_ij + Σ_{i'>i} L_out[i', i]ᵀ G_i'j,    R_ij = Σ_{j'>j} E_ij' L_in[j', j],    G_ij = E_ij + R_ij

so a tile needs the tiles to its right and all tiles below them: the anti-diagonals from the bottom right corner are
the largest sets of tiles that can be rounded at once, and there are m/P + n/Q − 1 of them. The rows are flipped here,
so that the tiles of an anti-diagonal lie on a diagonal, and every array is stored by rows or by columns of tiles, so
that what a chunk of a diagonal reads is one slice. Chunks and inner products have the lengths that are needed:
m n (m + n) / 2 multiplications in all, up to their granularity. `two_sided_tile` rounds the inside of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.linalg.precision import precise
from qjax.rounding.two_sided_tile import round_tiles

__all__ = ["tile_shape", "two_sided_codes"]

# Most rows and columns of a field, and terms of one inner product inside of it: short enough to skip zeros.
# Codewords of several rows have one field, the matrix: their encoders gain more from long diagonals than products do.
_FIELD, _INNER = 512, 128
_INNER_OF_ALL = 512


def _divisor(size: int, unit: int, limit: int) -> int:
    """The largest multiple of `unit` that divides `size` and is at most `limit` (`unit` when there is none)."""
    return max((k for k in range(unit, min(limit, size) + 1, unit) if size % k == 0), default=unit)


def tile_shape(codebook: Codebook, shape: tuple[int, int], rows: int, block: int) -> tuple[int, int]:
    """Rows P and columns Q of a tile of the wavefront: one block for codewords of many rows, else about 32×128.

    Large tiles make the matrix products of cheap codebooks efficient; costly ones (trellises) gain from many tiles,
    none of whose steps is only partly used.
    """
    if codebook.tile[0] > 1:
        return rows, block
    return _divisor(shape[0], rows, max(32, rows)), _divisor(shape[1], block, 128)


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
    """Codes `[m/r, n/c, ...]` of `Ŵ = Q(W + L_out'ᵀ E L_in' + L_out'ᵀ E + E L_in')`, L' = L − I, for codewords r×c.

    `rows` (A) and `block` are the blocks of L_out and L_in; at most `chunk` tiles are rounded together, which changes
    speed and memory only. Source: YAQA (2505.22988), the rounding rule, with `G` kept instead of the triple product.
    """
    m, n = weight.shape
    dtype = weight.dtype
    height, width = tile_shape(codebook, (m, n), rows, block)
    # What lies outside of a field is fed back by products of its size; within, a wavefront of tiles goes over it.
    field, inner = ((_divisor(m, height, _FIELD), _divisor(n, width, _FIELD)), _INNER)
    if codebook.tile[0] > 1:
        field, inner = (m, n), _INNER_OF_ALL

    def flip(x: Array) -> Array:
        return jnp.flip(x.reshape(m // rows, rows, -1), axis=0).reshape(m, -1)

    def rectangle(x: Array, i: Array, j: Array, size: tuple[int, int]) -> Array:
        return jax.lax.dynamic_slice(x, (i * size[0], j * size[1]), size)

    w, l_in = flip(weight), lower_in - jnp.eye(n, dtype=dtype)
    squares = (lower_out - jnp.eye(m, dtype=dtype)).reshape(m // rows, rows, m // rows, rows)
    l_out = jnp.flip(squares, axis=(0, 2)).reshape(m, m)
    scale, zero = scaling.at(jnp.arange(n), dtype)
    varies = scale.size > 1 or zero.size > 1
    if varies:
        scale, zero = (flip(jnp.broadcast_to(x, (m, n))) for x in (scale, zero))
    count_m, count_n = m // field[0], n // field[1]
    square_in, square_out = (field[1], field[1]), (field[0], field[0])

    def from_right(j: int) -> Callable[[Array, Array], Array]:
        """Feedback of the finished fields to the right of column j of fields, to row i of them, in one product."""
        start = (j + 1) * field[1]

        def product(error: Array, i: Array) -> Array:
            if start == n:
                return jnp.zeros(field, dtype)
            rows = jax.lax.dynamic_slice(error, (i * field[0], start), (field[0], n - start))
            return jnp.matmul(rows, l_in[start:, start - field[1] : start], precision=precise)

        return product

    def from_below(i: int) -> Callable[[Array, Array], Array]:
        """Feedback of the finished fields below row i of fields, to column j of them, in one product."""
        stop = i * field[0]

        def product(g: Array, j: Array) -> Array:
            if stop == 0:
                return jnp.zeros(field, dtype)
            columns = jax.lax.dynamic_slice(g, (0, j * field[1]), (stop, field[1]))
            return jnp.matmul(l_out[:stop, stop : stop + field[0]].T, columns, precision=precise)

        return product

    def one(state: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        """The field (i, j): fields from the bottom up, from right to left."""
        error, g = state
        i, j = index // count_n, count_n - 1 - index % count_n

        pick = (lambda x: rectangle(x, i, j, field)) if varies else (lambda x: x)
        own_e, own_g, codes = _wavefront(
            rectangle(w, i, j, field),
            jax.lax.switch(j, [from_right(k) for k in range(count_n)], error, i),
            jax.lax.switch(i, [from_below(k) for k in range(count_m)], g, j),
            rectangle(l_in, j, j, square_in),
            rectangle(l_out, i, i, square_out),
            pick(scale),
            pick(zero),
            codebook,
            rows=rows,
            block=block,
            tile=(height, width),
            chunk=chunk,
            inner=inner,
        )
        at = (i * field[0], j * field[1])
        return (jax.lax.dynamic_update_slice(error, own_e, at), jax.lax.dynamic_update_slice(g, own_g, at)), codes

    _, codes = jax.lax.scan(one, (jnp.zeros_like(w), jnp.zeros_like(w)), jnp.arange(count_m * count_n))
    codes = _assemble(jnp.flip(codes.reshape(count_m, count_n, *codes.shape[1:]), axis=1))
    return jnp.flip(codes.reshape(m // rows, -1, *codes.shape[1:]), axis=0).reshape(codes.shape)


def _wavefront(
    weight: Float[Array, "m n"],
    right: Float[Array, "m n"],
    below: Float[Array, "m n"],
    lower_in: Float[Array, "n n"],
    lower_out: Float[Array, "m m"],
    scale: Array,
    zero: Array,
    codebook: Codebook,
    *,
    rows: int,
    block: int,
    tile: tuple[int, int],
    chunk: int,
    inner: int,
) -> tuple[Array, Array, Array]:
    """(E, G) `[m, n]` and codes `[m/r, n/c, ...]` of a field, one anti-diagonal of tiles after the other.

    Rows are flipped. `right` and `below` are the feedback from outside of the field, `lower_in` and `lower_out` are
    L_in − I and L_out − I of its columns and rows.
    """
    m, n = weight.shape
    dtype = weight.dtype
    height, width = tile
    count_m, count_n = m // height, n // width
    c = min(chunk, count_m, count_n)
    inner_n, inner_m = _divisor(n, width, inner), _divisor(m, height, inner)
    varies = scale.size > 1 or zero.size > 1

    def by_rows(x: Array, value: float = 0.0) -> Array:
        """`[m, n]` -> rows of tiles `[count_m, P, n]`, with room for a chunk that starts in the last tile."""
        room = ((0, c - 1), (0, 0), (0, (c - 1) * width))
        return jnp.pad(x.reshape(count_m, height, n), room, constant_values=value)

    def by_columns(x: Array, count: int) -> Array:
        """`[k, n]` -> columns of tiles `[count, k, n / count]`, with that room."""
        return jnp.pad(jnp.moveaxis(x.reshape(x.shape[0], count, -1), 1, 0), ((0, c - 1), (0, 0), (0, 0)))

    def corners(x: Array, count: int) -> Array:
        size = x.shape[0] // count
        own = x.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count), :]
        return jnp.pad(own, ((0, c - 1), (0, 0), (0, 0)))

    corner_in, corner_out = corners(lower_in, count_n), corners(lower_out, count_m)
    columns_in = by_columns(lower_in, count_n)
    columns_out = jnp.pad(lower_out.T.reshape(count_m, height, m), ((0, c - 1), (0, 0), (0, 0)))  # their transposes
    w, right, below = by_rows(weight), by_rows(right), by_rows(below)
    if varies:
        scale, zero = by_rows(scale, 1.0), by_rows(zero)

    def diagonal(x: Array, i: Array, j: Array) -> Array:
        """The tiles (i, j), (i + 1, j + 1), ... of x: `[c, P, Q]`."""
        # Slices, not a gather, which XLA's CPU backend carries out element by element.
        size = (1, height, width)
        parts = [jax.lax.dynamic_slice(x, (i + k, 0, (j + k) * width), size) for k in range(c)]
        return jnp.concatenate(parts)

    def from_right(error: Array, i: Array, j: Array) -> Array:
        """`Σ_{j'>j} E_ij' L_in[j', j]` of the c tiles, without what is inside of them."""

        def add(k: Array, total: Array) -> Array:
            e = jax.lax.dynamic_slice(error, (i, 0, k * inner_n), (c, height, inner_n))
            feedback = jax.lax.dynamic_slice(columns_in, (j, k * inner_n, 0), (c, inner_n, width))
            return total + jnp.matmul(e, feedback, precision=precise)

        return jax.lax.fori_loop(j * width // inner_n, n // inner_n, add, diagonal(right, i, j))

    def from_below(g: Array, i: Array, j: Array) -> Array:
        """`Σ_{i'>i} L_out[i', i]ᵀ G_i'j` of the c tiles, without what is inside of them."""

        def add(k: Array, total: Array) -> Array:
            feedback = jax.lax.dynamic_slice(columns_out, (i, 0, k * inner_m), (c, height, inner_m))
            part = jax.lax.dynamic_slice(g, (j, k * inner_m, 0), (c, inner_m, width))
            return total + jnp.matmul(feedback, part, precision=precise)

        stop = jnp.minimum(((i + c) * height + inner_m - 1) // inner_m, m // inner_m)
        return jax.lax.fori_loop(0, stop, add, diagonal(below, i, j))

    def tiles(error: Array, g: Array, i: Array, j: Array) -> tuple[Array, Array, Array]:
        """Round c tiles: (E, G, codes)."""
        pick = (lambda x: diagonal(x, i, j)) if varies else (lambda x: x)
        own = lambda x, k: jax.lax.dynamic_slice_in_dim(x, k, c)  # noqa: E731
        return round_tiles(
            diagonal(w, i, j),
            from_right(error, i, j),
            from_below(g, i, j),
            own(corner_in, j),
            own(corner_out, i),
            pick(scale),
            pick(zero),
            codebook,
            rows=rows,
            block=block,
        )

    errors, feedbacks = jnp.zeros_like(w), jnp.zeros((count_n + c - 1, m, width), dtype)
    shape = jax.eval_shape(lambda e, g: tiles(e, g, jnp.int32(0), jnp.int32(0))[2], errors, feedbacks)
    steps = count_m + count_n - 1
    store = jnp.zeros((steps, count_m + c - 1, *shape.shape[1:]), shape.dtype)

    def diagonal_step(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first, last = jnp.maximum(0, t - count_n + 1), jnp.minimum(count_m - 1, t)

        def one(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            error, g, store = state
            i = first + k * c
            j = count_n - 1 - t + i
            own_e, own_g, codes = tiles(error, g, i, j)
            store = jax.lax.dynamic_update_slice(store, codes[None], (t, i) + (jnp.int32(0),) * (codes.ndim - 1))

            def put(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                error, g = state
                own = lambda x: jax.lax.dynamic_slice_in_dim(x, k, 1)  # noqa: E731
                zero = jnp.int32(0)
                error = jax.lax.dynamic_update_slice(error, own(own_e), (i + k, zero, (j + k) * width))
                return error, jax.lax.dynamic_update_slice(g, own(own_g), (j + k, (i + k) * height, zero))

            return *jax.lax.fori_loop(0, jnp.minimum(c, last - i + 1), put, (error, g)), store

        return jax.lax.fori_loop(0, (last - first + c) // c, one, state)

    error, g, store = jax.lax.fori_loop(0, steps, diagonal_step, (errors, feedbacks, store))
    i, j = jnp.arange(count_m).reshape(-1, 1), jnp.arange(count_n).reshape(1, -1)
    codes = _assemble(store[count_n - 1 - j + i, jnp.broadcast_to(i, (count_m, count_n))])
    g = jnp.moveaxis(g[:count_n], 0, 1).reshape(m, n)
    return error[:count_m, :, :n].reshape(m, n), g, codes


def _assemble(codes: Any) -> Array:
    """`[M, N, a, b, ...]` of tiles -> `[M a, N b, ...]` of the matrix."""
    big_m, big_n, a, b = codes.shape[:4]
    return jnp.swapaxes(codes, 1, 2).reshape(big_m * a, big_n * b, *codes.shape[4:])
