"""The nearest point of a ball of `D̂_d = {x ∈ (Z + ½)^d : Σx even}` in closed form, for the codebooks D4 and E8P.

The ball holds, per choice of signs, the magnitudes with at most four 3/2, or with one 5/2 and at most one 3/2, and ½
elsewhere. The number k of 3/2 alone decides the parity of Σ|x|, hence whether the number of minus signs must be even or
odd. So for given k the best magnitudes go by the order of the |y|, and where the signs of y have the wrong parity it is
best to flip the sign of the smallest |y|: a sort and eight comparisons replace a search through all magnitudes.

Everything here works on `Coordinates`: the d coordinates of a batch of tiles as d arrays of one shape, which compiles
to one fused elementwise loop on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

__all__ = [
    "BALL",
    "cheapest",
    "count_magnitudes",
    "descending",
    "has_five_halves",
    "lexicographic_index",
    "magnitude_levels",
    "odd",
    "ranks",
    "search_ball",
]

Coordinates = Sequence[Array]

FIVE_HALVES = 8
BALL = (0, 1, 2, 3, 4, FIVE_HALVES, FIVE_HALVES + 1)
"""The shapes of magnitudes in the ball: `k`, the number of 3/2, plus `FIVE_HALVES` when one coordinate is 5/2."""

_BUDGET = 4


def has_five_halves(option: Array) -> Array:
    """Whether a shape of the ball has a coordinate of magnitude 5/2 (boolean)."""
    return (option & FIVE_HALVES) != 0


def descending(values: Coordinates) -> list[Array]:
    """The values of every tile, largest first (an insertion network: 28 compare-exchanges for d = 8)."""
    out: list[Array] = []
    for value in values:
        for i, held in enumerate(out):
            out[i], value = jnp.maximum(held, value), jnp.minimum(held, value)
        out.append(value)
    return out


def ranks(values: Coordinates) -> list[Array]:
    """The place of every coordinate in descending order, 0 for the largest, as int32; of equal ones the first leads."""
    out = [jnp.zeros(values[0].shape, jnp.int32) for _ in values]
    for i in range(len(values)):
        for j in range(i):
            ahead = (values[i] > values[j]).astype(jnp.int32)
            out[j], out[i] = out[j] + ahead, out[i] + 1 - ahead
    return out


def odd(flags: Coordinates) -> Array:
    """Whether an odd number of boolean flags is set."""
    result = flags[0]
    for flag in flags[1:]:
        result = result ^ flag
    return result


def cheapest(costs: Coordinates) -> tuple[Array, Array, Array, Array]:
    """(lowest cost, its coordinate, second lowest cost, its coordinate) of every tile; of equal ones the first."""
    first, second = costs[0], jnp.full_like(costs[0], jnp.inf)
    at_first = at_second = jnp.zeros(costs[0].shape, jnp.int32)
    for i, cost in enumerate(costs[1:], start=1):
        wins, places = cost < first, cost < second
        second = jnp.where(wins, first, jnp.where(places, cost, second))
        at_second = jnp.where(wins, at_first, jnp.where(places, i, at_second))
        first, at_first = jnp.where(wins, cost, first), jnp.where(wins, i, at_first)
    return first, at_first, second, at_second


def search_ball(ordered: Sequence[Array], negative: Array) -> tuple[Array, Array]:
    """The best shape of the ball: (gain, option), option ∈ `BALL`.

    The gain is the decrease of `‖y − x‖²` against all magnitudes ½ with the signs of y. With `a = |y|`, a 3/2 gains
    `2a − 2`, a 5/2 gains `4a − 6`, and flipping the sign of a magnitude s costs `4as`.

    Args:
      ordered: `descending(|y|)`.
      negative: whether the number of negative coordinates of y is odd.
    """
    dim, low = len(ordered), ordered[-1]

    def flip(k: int) -> Array:
        cost = (6 if k == dim else 2) * low
        return jnp.where(negative, 0, cost) if k % 2 else jnp.where(negative, cost, 0)

    best, option = -flip(0), jnp.zeros(low.shape, jnp.int32)
    gains, total = [], jnp.zeros_like(low)
    for k in range(1, _BUDGET + 1):
        total = total + (2 * ordered[k - 1] - 2)
        gains.append((k, total - flip(k)))
    large = 4 * ordered[0] - 6
    gains.append((FIVE_HALVES, large - flip(0)))
    gains.append((FIVE_HALVES + 1, large + (2 * ordered[1] - 2) - flip(1)))
    for candidate, gain in gains:
        better = gain > best
        best, option = jnp.where(better, gain, best), jnp.where(better, candidate, option)
    return best, option


def magnitude_levels(option: Array, rank: Coordinates) -> list[Array]:
    """The magnitudes of a shape of the ball as levels 0, 1, 2 for ½, 3/2, 5/2 (int32), largest |y| first."""
    large = has_five_halves(option).astype(jnp.int32)
    raised = (option & (FIVE_HALVES - 1)) + large
    return [(r < raised).astype(jnp.int32) + (r < large).astype(jnp.int32) for r in rank]


def count_magnitudes(dim: int, budget: int = _BUDGET) -> int:
    """The number of magnitude vectors of length `dim` that cost at most `budget`; a 3/2 costs 1 and a 5/2 costs 3.

    `Σ_i C(dim, i)` over the number i ≤ budget of 3/2, plus `dim · Σ_i C(dim − 1, i)` over i ≤ budget − 3; budget ≤ 5.
    """
    without = sum(math.comb(dim, i) for i in range(budget + 1))
    return without + (dim * sum(math.comb(dim - 1, i) for i in range(budget - 2)) if dim else 0)


def lexicographic_index(levels: Coordinates) -> Array:
    """The place of magnitudes among all of the ball in ascending lexicographic order (int32): enumerative coding.

    `Σ_i #{vectors that agree before coordinate i and are smaller there}`, from counts that depend only on the remaining
    length and norm, so that no table of magnitudes is searched.
    """
    left = jnp.full(levels[0].shape, _BUDGET, jnp.int32)
    index = jnp.zeros(levels[0].shape, jnp.int32)
    for i, level in enumerate(levels):
        rest = len(levels) - 1 - i

        def count(budget: Array, rest: int = rest) -> Array:
            result = jnp.full(budget.shape, count_magnitudes(rest, _BUDGET), jnp.int32)
            for value in range(_BUDGET):
                result = jnp.where(budget == value, count_magnitudes(rest, value), result)
            return result

        index = index + jnp.where(level > 0, count(left), 0) + jnp.where(level > 1, count(left - 1), 0)
        left = left - level - (level > 1).astype(jnp.int32)
    return index
