"""The best path through a bitshift trellis, on XLA or with the costs of all states on the chip."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose
from pallas_kernels.viterbi import reference

__all__ = ["chosen", "costs", "search"]


def chosen(states: int, b: int, implementation: str | None = None) -> str:
    """The implementation that runs for a trellis of `states` states with b bits a step. Raises KernelError."""

    def obstacle() -> str | None:
        from pallas_kernels.viterbi import pallas_gpu  # here and below: Pallas takes 0.2 s to import

        return pallas_gpu.obstacle(states, b)

    return choose("viterbi", implementation, {"pallas_gpu": obstacle})


def costs(
    x: Float[Array, "steps V batch"],
    lut: Float[Array, "states V"],
    b: int,
    cost: Float[Array, "P batch"],
    implementation: str | None = None,
) -> Float[Array, "P batch"]:
    """`min Σ_t ‖lut[s_t] − x_t‖²` over paths that end in each of the P = states / 2^b edges and start with `cost`.

    State s takes in b bits a step, `s' = (s << b) mod states + c`; an edge is the low bits of a state that the next
    one keeps. Raises KernelError when a named implementation cannot run.

    Source: QTIP (2406.11235), section 2.3.
    """
    if chosen(lut.shape[0], b, implementation) == "pallas_gpu":
        from pallas_kernels.viterbi import pallas_gpu

        return pallas_gpu.forward(x, lut, b, cost, False)[0].T.astype(cost.dtype)
    return reference.forward(x, lut, b, cost, False)[0]


def search(
    x: Float[Array, "steps V batch"],
    lut: Float[Array, "states V"],
    b: int,
    cost: Float[Array, "P batch"],
    end: Int[Array, " batch"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"], Int[Array, "steps batch"]]:
    """The path of least cost that ends in the edge `end`, None: in whichever is best.

    Returns its cost, the edge before its first step and its states. Of equal predecessors the first wins. See `costs`.
    Raises KernelError when a named implementation cannot run.
    """
    if chosen(lut.shape[0], b, implementation) == "pallas_gpu":
        from pallas_kernels.viterbi import pallas_gpu

        final, first, states = pallas_gpu.search(x, lut, b, cost, end)
        return final.astype(cost.dtype), first, states
    return reference.search(x, lut, b, cost, end)
