"""Two-sided linear feedback inside tiles: their row blocks a step apart, each going through the columns.

A tile is p row blocks of s pieces, and a piece some column blocks that are swept one after the other. In flipped order
(row block 0 is the bottom one, to which nothing in the tile feeds back) row block i rounds piece `s − 1 − t + i` in
step t: what it needs from the row block before it in this order was finished in the step before, so s + p − 1 steps
round a tile and every step rounds up to p pieces of it. Arrays are sheared, row block i shifted by `p − 1 − i` pieces,
so that all pieces of a step are one slice. The G of earlier steps moves through a delay line, one place and one row
block per step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.linalg.precision import precise
from qjax.rounding.columns import encode_columns

__all__ = ["round_tiles"]

_PIECE = 8  # columns of a piece at most: what is fed back within it is small, and stays in cache


def round_tiles(
    weight: Float[Array, "c P Q"],
    right: Float[Array, "c P Q"],
    below: Float[Array, "c P Q"],
    lower_in: Float[Array, "c Q Q"],
    lower_out: Float[Array, "c P P"],
    scale: Array,
    zero: Array,
    codebook: Codebook,
    *,
    rows: int,
    block: int,
) -> tuple[Array, Array, Array]:
    """Round c independent tiles: (E, G) `[c, P, Q]` and codes `[c, P/r, Q/w, ...]`, for codewords r×w.

    Row blocks of `rows` rows are in flipped order. `right` and `below` is the feedback from outside of the tiles,
    `lower_in` and `lower_out` are L_in − I and L_out − I of their columns and rows; (scale, zero) are `[c, P, Q]` or
    `[1, 1]`.
    """
    c, height, width = weight.shape
    piece = max((k for k in range(block, min(_PIECE, width) + 1, block) if width % k == 0), default=block)
    p, s = height // rows, width // piece
    varies = scale.size > 1 or zero.size > 1

    def by_blocks(x: Array) -> Array:
        return x.reshape(c, p, rows, width)

    def encode(target: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
        """Values and codes `[c, p, A/r, block/w, ...]` of one block of every row block."""
        flat = (lambda x: x.reshape(c * p * rows, block)) if varies else (lambda x: x.reshape(1, 1))
        values, codes = encode_columns(target.reshape(c * p * rows, block), codebook, flat(scale), flat(zero))
        return values.reshape(target.shape), codes.reshape(c, p, -1, *codes.shape[1:])

    def swept(own: Array, target: Array, corner: Array, scale: Array, zero: Array) -> tuple[Array, Array, Array]:
        """(E, E (L_in − I), codes) of a piece, block by block from the right, for `corner` L_in − I of its columns."""
        if piece == block:
            values, codes = encode(target, scale, zero)
            return own - values, jnp.zeros_like(own), codes
        cut = lambda x, k: jax.lax.dynamic_slice_in_dim(x, k * block, block, axis=3)  # noqa: E731
        pick = cut if varies else (lambda x, k: x)

        def one(error: Array, k: Array) -> tuple[Array, Array]:
            r = jnp.einsum("cpak,cpkb->cpab", error, cut(corner, k), precision=precise)
            values, codes = encode(cut(target, k) + r, pick(scale, k), pick(zero, k))
            new = cut(own, k) - values
            return jax.lax.dynamic_update_slice_in_dim(error, new, k * block, axis=3), codes

        error, codes = jax.lax.scan(one, jnp.zeros_like(own), jnp.arange(piece // block), reverse=True)
        inner = jnp.einsum("cpak,cpkb->cpab", error, corner, precision=precise)
        codes = jnp.moveaxis(codes, 0, 3)  # [c, p, A/r, blocks, block/w, ...]
        return error, inner, codes.reshape(*codes.shape[:3], -1, *codes.shape[5:])

    if s == 1 and p == 1:
        own, right = by_blocks(weight), by_blocks(right)
        every = (by_blocks(x) if varies else x for x in (scale, zero))
        error, inner, codes = swept(own, own + right + by_blocks(below), lower_in[:, None], *every)
        return error.reshape(weight.shape), (error + right + inner).reshape(weight.shape), codes[:, 0]

    def sheared(x: Array, axes: tuple[int, ...], value: float = 0.0) -> Array:
        """`x[:, i]` shifted by its row block's place along `axes` of it, stacked."""
        parts = []
        for i in range(p):
            padding = [(0, 0)] * (x.ndim - 1)
            for axis in axes:
                padding[axis] = ((p - 1 - i) * piece, i * piece)
            parts.append(jnp.pad(x[:, i], padding, constant_values=value))
        return jnp.stack(parts, axis=1)

    def at(x: Array, t: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, (s + p - 2 - t) * piece, piece, axis=3)

    own = sheared(by_blocks(weight), (2,))
    right, below = sheared(by_blocks(right), (2,)), sheared(by_blocks(below), (2,))
    feedback = sheared(jnp.broadcast_to(lower_in[:, None], (c, p, width, width)), (1, 2))
    if varies:
        scale, zero = sheared(by_blocks(scale), (2,), 1.0), sheared(by_blocks(zero), (2,))
    pairs = lower_out.reshape(c, p, rows, p, rows)
    none = jnp.zeros((c, rows, rows), weight.dtype)
    # [c, i, d, k, a]: from row block i − d − 1 to row block i
    upward = [[pairs[:, i - d, :, i] if d <= i else none for d in range(1, p)] for i in range(p)]
    delayed = jnp.zeros((c, p, p - 1, rows, piece), weight.dtype)
    if p > 1:
        upward = jnp.stack([jnp.stack(row, axis=1) for row in upward], axis=1)

    def later(x: Array) -> Array:
        """x moved on by one row block: row block i has the values of row block i − 1."""
        return jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))

    def step(state: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        error, delayed = state
        start = (s + p - 2 - t) * piece
        columns = at(feedback, t)
        r = at(right, t) + jnp.einsum("cpak,cpkb->cpab", error, columns, precision=precise)
        target = at(own, t) + at(below, t) + r
        if p > 1:
            target = target + jnp.einsum("cpdka,cpdkb->cpab", upward, delayed, precision=precise)
        corner = jax.lax.dynamic_slice_in_dim(columns, start, piece, axis=2)
        scales = (at(scale, t), at(zero, t)) if varies else (scale, zero)
        new, inner, codes = swept(at(own, t), target, corner, *scales)
        g = new + r + inner
        error = jax.lax.dynamic_update_slice_in_dim(error, new, start, axis=3)
        if p > 1:
            delayed = jnp.concatenate([later(g)[:, :, None], later(delayed)[:, :, :-1]], axis=2)
        return (error, delayed), (g, codes)

    (error, _), (g, codes) = jax.lax.scan(step, (jnp.zeros_like(own), delayed), jnp.arange(s + p - 1))
    error = jnp.stack([error[:, i, :, (p - 1 - i) * piece :][:, :, :width] for i in range(p)], axis=1)
    return error.reshape(weight.shape), _gathered(g, p, s), _gathered(codes, p, s)


def _gathered(x: Any, p: int, s: int) -> Array:
    """Pieces `[steps, c, p, a, b, ...]` of all steps -> `[c, p a, s b, ...]` of the tiles."""
    parts = [jnp.flip(x[i : i + s, :, i], axis=0) for i in range(p)]  # [s, c, a, b, ...]
    whole = jnp.moveaxis(jnp.stack(parts, axis=2), 0, 3)  # [s, c, p, a, ...] -> [c, p, a, s, b, ...]
    c, _, a, _, b = whole.shape[:5]
    return whole.reshape(c, p * a, s * b, *whole.shape[5:])
