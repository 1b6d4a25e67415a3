"""Trellis search on a GPU: one program per sequence, whose P costs stay in registers and shared memory for all steps.

The minimum over the D predecessors is elementwise: the costs split into D rows of P/D edges, row d holding the
predecessors of states `d P + e`, and new edge `e = j D + c` takes `min_d row_d[j] + ‖table[d P + j D + c] − x_t‖²`. The
D² tables are stored so that every one is contiguous in j. Interleaving the D results and splitting them again is the
only exchange between threads. Of device memory a step reads the table (from the caches) and writes P back-pointers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.triton import parameters, unavailable

__all__ = ["forward", "obstacle", "search", "trace_back"]

_LANES = 32
"""Sequences that one program traces back."""


def obstacle(states: int, b: int) -> str | None:
    """The reason why the search of a trellis of `states` states with b bits a step cannot run, None when it can."""
    edges, fan = states >> b, 2**b
    if b > 4:
        return f"its D² = {fan * fan} tables per step are written out, and {b} bits a step are too many; at most 4"
    if edges < 2 * fan:  # Triton's compiler crashes where a row of costs has one value
        return f"it needs at least twice as many edges as predecessors, found {edges} and {fan}"
    if edges > 2**15:
        return f"{edges} costs do not fit the registers of a program; at most {2**15}"
    return unavailable()


def _interleave(parts: list[Array]) -> Array:
    """`[n, D]` with part c in column c; D is a power of two, and joins are of two arrays at a time."""
    if len(parts) == 1:
        return parts[0]
    even, odd = _interleave(parts[0::2]), _interleave(parts[1::2])
    return jnp.stack([even, odd], axis=-1).reshape(parts[0].shape[0], len(parts))


def _forward_kernel(x_ref: Any, lut_ref: Any, start_ref: Any, cost_ref: Any, *back_ref: Any, steps: int) -> None:
    values, fan = lut_ref.shape[0], lut_ref.shape[1]
    edges = start_ref.shape[0]

    def step(t: Array, cost: Array) -> Array:
        rows = jax.lax.split(cost, [edges // fan] * fan)
        x = [x_ref[t, v] for v in range(values)]
        costs, choices = [], []
        for c in range(fan):
            best, choice = None, jnp.zeros(edges // fan, jnp.int32)
            for d in range(fan):
                new = rows[d]
                for v in range(values):
                    new = new + jnp.square(lut_ref[v, d, c, :] - x[v])
                if best is None:
                    best = new
                    continue
                closer = new < best
                choice, best = jnp.where(closer, jnp.int32(d), choice), jnp.where(closer, new, best)
            costs.append(best)
            choices.append(choice)
        if back_ref:
            back_ref[0][t, :] = _interleave(choices).reshape(edges).astype(jnp.uint8)
        return _interleave(costs).reshape(edges)

    cost_ref[:] = jax.lax.fori_loop(0, steps, step, start_ref[:])


def forward(
    x: Float[Array, "steps V batch"],
    lut: Float[Array, "states V"],
    b: int,
    cost: Float[Array, "P batch"],
    back: bool,
    interpret: Any = False,
) -> tuple[Float[Array, "batch P"], UInt8[Array, "batch steps P"] | None]:
    """Costs of the best paths into every edge, and with `back` the back-pointers; a sequence's values are contiguous.

    Raises nothing itself: `obstacle` says beforehand what cannot run.
    """
    steps, values, batch = x.shape
    edges, fan = cost.shape[0], 2**b
    tables = lut.astype(jnp.float32).reshape(fan, edges // fan, fan, values).transpose(3, 0, 2, 1)
    whole = (values, fan, fan, edges // fan)
    own = lambda *shape: pl.BlockSpec((None, *shape), lambda i: (i, *(0 for _ in shape)))  # noqa: E731
    out_shape = [jax.ShapeDtypeStruct((batch, edges), jnp.float32)]
    out_specs = [own(edges)]
    if back:
        out_shape.append(jax.ShapeDtypeStruct((batch, steps, edges), jnp.uint8))
        out_specs.append(own(steps, edges))
    result = pl.pallas_call(
        functools.partial(_forward_kernel, steps=steps),
        grid=(batch,),
        in_specs=[own(steps, values), pl.BlockSpec(whole, lambda i: (0, 0, 0, 0)), own(edges)],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=parameters(warps=min(max(edges // 1024, 4), 16)),
        interpret=interpret,
        name="viterbi_forward",
    )(x.astype(jnp.float32).transpose(2, 0, 1), tables, cost.astype(jnp.float32).T)
    return result[0], result[1] if back else None


def _trace_kernel(back_ref: Any, end_ref: Any, first_ref: Any, states_ref: Any, *, b: int) -> None:
    batch, steps, edges = back_ref.shape
    lane = pl.program_id(0) * _LANES + jax.lax.broadcasted_iota(jnp.int32, (_LANES,), 0)
    lane = jnp.minimum(lane, batch - 1)  # lanes beyond the batch repeat the last sequence

    def step(i: Array, edge: Array) -> Array:
        t = steps - 1 - i
        state = back_ref[lane, t, edge].astype(jnp.int32) * edges + edge
        states_ref[t, :] = state
        return state >> b

    first_ref[:] = jax.lax.fori_loop(0, steps, step, end_ref[lane])


def trace_back(
    back: UInt8[Array, "batch steps P"], edge: Int[Array, " batch"], b: int, interpret: Any = False
) -> tuple[Int[Array, " batch"], Int[Array, "steps batch"]]:
    """The paths that end in `edge`: (the edge before the first step, states)."""
    batch, steps, _ = back.shape
    programs = -(-batch // _LANES)
    total = programs * _LANES
    first, states = pl.pallas_call(
        functools.partial(_trace_kernel, b=b),
        grid=(programs,),
        in_specs=[pl.BlockSpec(back.shape, lambda i: (0, 0, 0)), pl.BlockSpec((batch,), lambda i: (0,))],
        out_specs=[pl.BlockSpec((_LANES,), lambda i: (i,)), pl.BlockSpec((steps, _LANES), lambda i: (0, i))],
        out_shape=[jax.ShapeDtypeStruct((total,), jnp.int32), jax.ShapeDtypeStruct((steps, total), jnp.int32)],
        compiler_params=parameters(warps=1),
        interpret=interpret,
        name="viterbi_trace_back",
    )(back, edge)
    return first[:batch], states[:, :batch]


def search(
    x: Float[Array, "steps V batch"],
    lut: Float[Array, "states V"],
    b: int,
    cost: Float[Array, "P batch"],
    end: Int[Array, " batch"] | None,
    interpret: Any = False,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"], Int[Array, "steps batch"]]:
    """(cost, edge before the first step, states) of the best path that ends in `end`, None: in the best edge."""
    final, back = forward(x, lut, b, cost, True, interpret)
    assert back is not None
    if end is None:
        end = jnp.argmin(final, axis=1).astype(jnp.int32)
    first, states = trace_back(back, end, b, interpret)
    return jnp.take_along_axis(final, end[:, None], axis=1, mode="clip")[:, 0], first, states
