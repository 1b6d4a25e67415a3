"""Closed paths through a bitshift trellis, by searches of `pallas_kernels.viterbi` (which chooses the kernel).

State s ∈ [0, 2^L) takes in b = K·V bits a step, `s' = (s << b) mod 2^L + c`, and emits `table[s']`. Between two steps
only the low `L − b` bits of the state matter, its *edge* e ∈ [0, P), P = 2^(L−b).

Searches with fewer survivors do not pay on a CPU: in the same time a smaller L has the lesser error. Measured at K=2,
1MAD, free ends, on a loaded machine: one survivor for each value of the last 10 bits of the state at L=16 leaves 0.0772
of a Gaussian's variance, Viterbi at L=10 leaves 0.0760 in a seventh of the time, because a survivor's state has a value
of its own, not shared by the batch. Sorting the 1024 candidates of a beam of 256 (`jax.lax.top_k`) takes three times
as long as an exact step at L=16. Costs as 16-bit integers took 1.4 to 2 times the time of float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.viterbi import costs, search
from pallas_kernels.viterbi.reference import forward, trace_back

__all__ = ["exact_tail_biting", "forward", "one_pass_tail_biting", "tail_biting", "trace_back"]

FAR = 1e30
"""The cost of an edge that is not allowed: finite, so that no difference of infinities is ever formed."""


def _pinned(x: Array, lut: Array, b: int, first: Array, last: Array) -> tuple[Array, Array]:
    """(cost, states) of the best path from the edge `first` to the edge `last`."""
    there = jnp.arange(lut.shape[0] >> b, dtype=jnp.int32)[:, None] == first[None, :]
    start = jnp.where(there, 0.0, FAR).astype(x.dtype)
    cost, _, states = search(x, lut, b, start, last)
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
    return _pinned(x, lut, b, seam, seam)[1]


def one_pass_tail_biting(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int, overlap: int | None = None
) -> Int[Array, "steps batch"]:
    """States of a tail-biting path from one pass over the last `overlap` steps (None: all) and the whole sequence.

    At the end of the sequence nearly all survivors share the edge e they had at its beginning, so the survivor that
    ends in e is a path that begins in it: the best one from e to e. Where one begins elsewhere, in e', the last
    `overlap` steps are searched once more, with e' as their end. The pass runs on XLA everywhere: it needs the
    back-pointers twice, which the kernel keeps to itself.
    """
    steps, edges = x.shape[0], lut.shape[0] >> b
    reach = steps if overlap is None else min(overlap, steps)
    cost, _ = forward(x[steps - reach :], lut, b, jnp.zeros((edges, x.shape[2]), x.dtype), False)
    cost, back = forward(x, lut, b, cost, True)
    assert back is not None
    seam, _ = trace_back(back, jnp.argmin(cost, axis=0).astype(jnp.int32), b)
    first, states = trace_back(back, seam, b)
    tail = min(steps, max(reach, -(-(edges.bit_length() - 1) // b)))  # as many steps as lead from any edge to any other

    def closed(states: Array) -> Array:
        # A lane that is closed already has its own tail found again: a part of a best path is a best path.
        entry = states[steps - tail - 1] & (edges - 1) if tail < steps else first
        return jnp.concatenate([states[: steps - tail], _pinned(x[steps - tail :], lut, b, entry, first)[1]])

    return jax.lax.cond(jnp.all(first == seam), lambda states: states, closed, states)


def exact_tail_biting(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int
) -> Int[Array, "steps batch"]:
    """States of the best tail-biting path of all: every edge is tried as the seam, `2^(L−b)` times the work."""
    edges, batch = lut.shape[0] >> b, x.shape[2]

    def attempt(best: tuple[Array, Array], edge: Array) -> tuple[tuple[Array, Array], None]:
        seam = jnp.full(batch, edge, jnp.int32)
        cost, states = _pinned(x, lut, b, seam, seam)
        better = cost < best[0]
        return (jnp.where(better, cost, best[0]), jnp.where(better[None, :], states, best[1])), None

    start = (jnp.full(batch, FAR, x.dtype), jnp.zeros((x.shape[0], batch), jnp.int32))
    return jax.lax.scan(attempt, start, jnp.arange(edges, dtype=jnp.int32))[0][1]
