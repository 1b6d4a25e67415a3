"""Dynamic programming over the budget: the multiple-choice knapsack solved exactly, up to steps of the budget."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Int

from qjax.allocate.base import ALLOCATORS, Problem
from qjax.allocate.greedy import filled
from qjax.registry import Count, check_options

__all__ = ["Dynamic"]


@ALLOCATORS.register("dynamic")
@dataclasses.dataclass(frozen=True)
class Dynamic:
    """`best[b] = min over levels of best[b − size] + loss`, layer after layer, b the budget above the cheapest levels.

    Sizes are whole numbers with a common step where the budget has at most `steps` of these: then the solution is
    exact. Otherwise sizes are rounded up to one of `steps` parts of the budget, so that it is never exceeded, and what
    is left over is given to the switches that still fit.

    Attributes:
      steps: parts of the budget.
    """

    steps: Count = 10_000

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, "allocator")

    def __call__(self, problem: Problem) -> Int[np.ndarray, " layers"]:
        """The level of every layer."""
        there = np.isfinite(problem.losses)
        least = np.where(there, problem.sizes, np.inf).min(axis=1, keepdims=True)
        extra = np.where(there, problem.sizes - least, 0)
        room = problem.budget - least.sum()
        unit = self._unit(extra, room)
        count = math.floor(room / unit * (1 + 1e-12)) if unit > 0 else 0
        # Without room above the cheapest levels there are these alone.
        cost = (extra > 0).astype(np.int64) if unit == 0 else np.ceil(extra / unit).astype(np.int64)
        best = np.zeros(count + 1)
        chosen = np.empty((len(extra), count + 1), np.uint8 if extra.shape[1] < 256 else np.int32)
        for layer, (losses, costs) in enumerate(zip(problem.losses, cost, strict=True)):
            found = np.full(count + 1, np.inf)
            for level in np.argsort(costs, kind="stable"):
                if costs[level] <= count and np.isfinite(losses[level]):
                    own = np.full(count + 1, np.inf)
                    own[costs[level] :] = best[: count + 1 - costs[level]] + losses[level]
                    better = own < found
                    found[better] = own[better]
                    chosen[layer, better] = level
            best = found
        levels, left = np.empty(len(extra), np.int64), count
        for layer in reversed(range(len(extra))):
            levels[layer] = chosen[layer, left]
            left -= cost[layer, levels[layer]]
        return filled(problem, levels)

    def _unit(self, extra: np.ndarray, room: float) -> float:
        """The step of the budget: the common divisor of the sizes where they have one that is large enough."""
        if room <= 0:
            return 0.0
        if (extra == np.round(extra)).all() and extra.max() < 2**53:
            common = math.gcd(*(int(value) for value in extra.ravel()))
            if common and room / common <= self.steps:
                return float(common)
        return room / self.steps
