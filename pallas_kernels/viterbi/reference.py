"""The best path through a bitshift trellis on XLA: Viterbi's algorithm in edge form, batched, without gathers.

State s ∈ [0, 2^L) takes in b = K·V bits a step, `s' = (s << b) mod 2^L + c`, and emits `table[s']`. Between two steps
only the low `L − b` bits of the state matter, its *edge* e ∈ [0, P), P = 2^(L−b). With D = 2^b,

    cost'[e] = min_d  cost[(d P + e) >> b] + ‖table[d P + e] − x_t‖²        back[t, e] = the least d that attains it

Costs are `[P, batch]`: the batch is the fastest axis, so every operation is one over contiguous lanes, and the minimum
over d is a chain of compares that the compiler fuses with the distances.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["forward", "search", "trace_back"]

_UNROLLED = 16
"""Compares in a chain: longer ones take XLA minutes to compile and run no faster."""


def _step(cost: Array, lut: Array, x: Array, b: int, back: bool) -> tuple[Array, Array | None]:
    """One step: cost [P, B], lut [2^L, V], x [V, B] -> (cost', back-pointers [P, B] or None)."""
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
    pointers = choice.reshape(edges, batch).astype(jnp.uint8 if b <= 8 else jnp.uint16) if back else None
    return best.reshape(edges, batch), pointers


def forward(
    x: Float[Array, "steps V batch"], lut: Float[Array, "states V"], b: int, cost: Float[Array, "P batch"], back: bool
) -> tuple[Float[Array, "P batch"], Array | None]:
    """Costs of the best paths into every edge, and with `back` the back-pointers `[steps, P, batch]`, the digits d."""
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


def search(
    x: Float[Array, "steps V batch"],
    lut: Float[Array, "states V"],
    b: int,
    cost: Float[Array, "P batch"],
    end: Int[Array, " batch"] | None,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"], Int[Array, "steps batch"]]:
    """(cost, edge before the first step, states) of the best path that ends in `end`, None: in the best edge."""
    final, back = forward(x, lut, b, cost, True)
    assert back is not None
    if end is None:
        end = jnp.argmin(final, axis=0).astype(jnp.int32)
    first, states = trace_back(back, end, b)
    return jnp.take_along_axis(final, end[None, :], axis=0, mode="clip")[0], first, states
