"""Closed paths through a bitshift trellis, by searches of `pallas_kernels.viterbi` (which chooses the kernel).

State s ∈ [0, 2^L) takes in b = K·V bits a step, `s' = (s << b) mod 2^L + c`, and emits `table[s']`. Between two steps
only the low `L − b` bits of the state matter, its *edge* e ∈ [0, P), P = 2^(L−b).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.viterbi import costs, search
from pallas_kernels.viterbi.reference import forward, trace_back

__all__ = ["exact_tail_biting", "forward", "tail_biting", "trace_back"]

FAR = 1e30
"""The cost of an edge that is not allowed: finite, so that no difference of infinities is ever formed."""


def _pinned(x: Array, lut: Array, b: int, edge: Array, edges: int) -> tuple[Array, Array]:
    """(cost, states) of the best path that begins and ends in `edge`."""
    there = jnp.arange(edges, dtype=jnp.int32)[:, None] == edge[None, :]
    start = jnp.where(there, 0.0, FAR).astype(x.dtype)
    cost, _, states = search(x, lut, b, start, edge)
    return cost, states


def tail_biting(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int, overlap: int | None = None
) -> Int[Array, "steps batch"]:
    """States of a path whose last edge is the one before its first step, near the best (QTIP, algorithm 4).

    A first pass with free ends over the sequence rotated by half finds the edge e at the seam; a second pass on the
    sequence itself begins and ends in e. The first pass reads `overlap` steps on either side of the seam, None: all.
    """
    steps, edges = x.shape[0], lut.shape[0] >> b
    reach = steps // 2 if overlap is None else min(overlap, steps // 2)
    free = jnp.zeros((edges, x.shape[2]), x.dtype)
    cost = costs(x[steps - reach :], lut, b, free)
    _, seam, _ = search(x[:reach] if overlap is not None else x[: steps - reach], lut, b, cost)
    return _pinned(x, lut, b, seam, edges)[1]


def exact_tail_biting(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int
) -> Int[Array, "steps batch"]:
    """States of the best tail-biting path of all: every edge is tried as the seam, `2^(L−b)` times the work."""
    edges, batch = lut.shape[0] >> b, x.shape[2]

    def attempt(best: tuple[Array, Array], edge: Array) -> tuple[tuple[Array, Array], None]:
        cost, states = _pinned(x, lut, b, jnp.full(batch, edge, jnp.int32), edges)
        better = cost < best[0]
        return (jnp.where(better, cost, best[0]), jnp.where(better[None, :], states, best[1])), None

    start = (jnp.full(batch, FAR, x.dtype), jnp.zeros((x.shape[0], batch), jnp.int32))
    return jax.lax.scan(attempt, start, jnp.arange(edges, dtype=jnp.int32))[0][1]
