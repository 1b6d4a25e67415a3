"""The best path through a bitshift trellis: Viterbi's algorithm in edge form, batched, without gathers.

State s ∈ [0, 2^L) takes in b = K·V bits a step, `s' = (s << b) mod 2^L + c`, and emits `table[s']`. Between two steps
only the low `L − b` bits of the state matter, its *edge* e ∈ [0, P), P = 2^(L−b). With D = 2^b,

    cost'[e] = min_d  cost[(d P + e) >> b] + ‖table[d P + e] − x_t‖²        back[t, e] = the least d that attains it

Costs are `[P, batch]`: the batch is the fastest axis, so every operation is one over contiguous lanes, and the minimum
over d is a chain of compares that the compiler fuses with the distances.

Searches with fewer survivors do not pay on a CPU: in the same time a smaller L has the lesser error. Measured at K=2,
1MAD, free ends, on a loaded machine: one survivor for each value of the last 10 bits of the state at L=16 leaves 0.0772
of a Gaussian's variance, Viterbi at L=10 leaves 0.0760 in a seventh of the time, because the value of a survivor's state
is its own and not shared by the batch. Sorting the 1024 candidates of a beam of 256 (`jax.lax.top_k`) takes three times
as long as an exact step at L=16. Costs as 16-bit integers took 1.4 to 2 times the time of float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["exact_tail_biting", "forward", "one_pass_tail_biting", "tail_biting", "trace_back"]

FAR = 1e30
"""The cost of an edge that is not allowed: finite, so that no difference of infinities is ever formed."""


_UNROLLED = 16
"""Compares in a chain: longer ones take XLA minutes to compile and run no faster."""


def _step(cost: Array, lut: Array, x: Array, b: int, back: bool) -> tuple[Array, Array | None]:
    """One step: cost [P, B], lut [2^L, V], x [V, B] -> (cost', back-pointers uint8 [P, B] or None)."""
    edges, batch = cost.shape
    fan, values = 2**b, lut.shape[1]
    if edges >= fan:  # the predecessors of row d are a block of edges, each used D times
        shape, source = (fan, edges // fan, fan), cost.reshape(fan, edges // fan, 1, batch)
    else:
        shape = (fan, edges, 1)
        source = jnp.repeat(cost, fan, axis=0).reshape(fan, edges, 1, batch)
    if values == 1:
        table = lut.reshape(*shape, 1)
    else:  # ‖table‖² − 2 table·x as one matrix product: a longer sum in the chain below would run ten times slower
        product = jnp.matmul(lut, -2 * x, precision=jax.lax.Precision.HIGHEST)
        distance = product + jnp.sum(jnp.square(lut), axis=1)[:, None] + jnp.sum(jnp.square(x), axis=0)[None, :]
        table = distance.reshape(*shape, batch)

    def candidate(source: Array, table: Array, d: int) -> Array:
        return source[d] + (table[d] if values > 1 else jnp.square(table[d] - x[0][None, None, :]))

    # Written out, not as a loop over a function of (best, choice): XLA makes a third faster code of it.
    best, choice = candidate(source, table, 0), jnp.zeros((*shape[1:], batch), jnp.int32)
    for d in range(1, min(fan, _UNROLLED)):
        new = candidate(source, table, d)
        closer = new < best
        choice, best = jnp.where(closer, jnp.int32(d), choice), jnp.where(closer, new, best)
    if fan > _UNROLLED:

        def more(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            best, choice = state
            first = i * _UNROLLED
            part, near = (jax.lax.dynamic_slice_in_dim(x, first, _UNROLLED) for x in (source, table))
            for d in range(_UNROLLED):
                new = candidate(part, near, d)
                closer = new < best
                choice, best = jnp.where(closer, first + d, choice), jnp.where(closer, new, best)
            return best, choice

        best, choice = jax.lax.fori_loop(1, fan // _UNROLLED, more, (best, choice))
    return best.reshape(edges, batch), choice.reshape(edges, batch).astype(jnp.uint8) if back else None


def forward(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int, cost: Float[Array, "P batch"], back: bool
) -> tuple[Float[Array, "P batch"], Array | None]:
    """Costs of the best paths into every edge, and with `back` the back-pointers `[steps, P, batch]` (uint8)."""
    return jax.lax.scan(lambda cost, item: _step(cost, lut, item, b, back), cost, x)


def trace_back(back: Array, edge: Int[Array, " batch"], b: int) -> tuple[Int[Array, " batch"], Array]:
    """The path that ends in `edge`: (the edge before its first step, states `[steps, batch]`)."""
    steps, edges, batch = back.shape
    flat = back.reshape(-1)
    lane = jnp.arange(batch, dtype=jnp.int32)

    def step(edge: Array, t: Array) -> tuple[Array, Array]:
        digit = jnp.take(flat, (t * edges + edge) * batch + lane, mode="clip").astype(jnp.int32)
        state = digit * edges + edge
        return state >> b, state

    return jax.lax.scan(step, edge, jnp.arange(steps, dtype=jnp.int32), reverse=True)


def _pinned(x: Array, lut: Array, b: int, first: Array, last: Array) -> tuple[Array, Array]:
    """(cost, states) of the best path from the edge `first` to the edge `last`."""
    there = jnp.arange(lut.shape[0] >> b, dtype=jnp.int32)[:, None] == first[None, :]
    cost, back = forward(x, lut, b, jnp.where(there, 0.0, FAR).astype(x.dtype), True)
    assert back is not None
    final = jnp.take_along_axis(cost, last[None, :], axis=0, mode="clip")[0]
    return final, trace_back(back, last, b)[1]


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
    cost, _ = forward(x[steps - reach :], lut, b, free, False)
    cost, back = forward(x[:reach] if overlap is not None else x[: steps - reach], lut, b, cost, True)
    assert back is not None
    seam, _ = trace_back(back, jnp.argmin(cost, axis=0).astype(jnp.int32), b)
    return _pinned(x, lut, b, seam, seam)[1]


def one_pass_tail_biting(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int, overlap: int | None = None
) -> Int[Array, "steps batch"]:
    """As `tail_biting`, from one pass over the last `overlap` steps (None: all) and then the whole sequence.

    At the end of the sequence nearly all survivors share the edge e they had at its beginning, so the survivor that
    ends in e is a path that begins in it: the best one from e to e. Where one begins elsewhere, in e', the last
    `overlap` steps are searched once more, with e' as their end.
    """
    steps, edges = x.shape[0], lut.shape[0] >> b
    reach = steps if overlap is None else min(overlap, steps)
    cost, _ = forward(x[steps - reach :], lut, b, jnp.zeros((edges, x.shape[2]), x.dtype), False)
    cost, back = forward(x, lut, b, cost, True)
    assert back is not None
    seam, _ = trace_back(back, jnp.argmin(cost, axis=0).astype(jnp.int32), b)
    first, states = trace_back(back, seam, b)
    tail = min(steps, max(reach, -(-(edges.bit_length() - 1) // b)))  # as many steps as lead from any edge to any other

    def mended(states: Array) -> Array:
        # A lane that is closed already has its own tail found again: a part of a best path is a best path.
        entry = states[steps - tail - 1] & (edges - 1) if tail < steps else first
        return jnp.concatenate([states[: steps - tail], _pinned(x[steps - tail :], lut, b, entry, first)[1]])

    return jax.lax.cond(jnp.all(first == seam), lambda states: states, mended, states)


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
