"""The best loss per bit, one switch after the other."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from qjax.allocate.base import ALLOCATORS, Problem

__all__ = ["Greedy", "filled"]


@ALLOCATORS.register("greedy")
@dataclasses.dataclass(frozen=True)
class Greedy:
    """From the cheapest levels the switch of the greatest fall in loss per size, while one fits the budget."""

    def __call__(self, problem: Problem) -> Int[np.ndarray, " layers"]:
        """The level of every layer."""
        cheap = np.where(np.isfinite(problem.losses), problem.sizes, np.inf)
        # Of levels that cost the same the best.
        order = (
            np.lexsort((problem.losses, cheap), axis=1) if problem.losses.shape[1] > 1 else np.zeros_like(cheap, int)
        )
        return filled(problem, order[:, 0])


def filled(problem: Problem, levels: Int[np.ndarray, " layers"]) -> Int[np.ndarray, " layers"]:
    """Levels after all switches that lower the loss and still fit, the greatest fall per size first."""
    levels, rows = levels.copy(), np.arange(len(levels))
    while True:
        extra = problem.sizes - problem.sizes[rows, levels][:, None]
        fall = problem.losses[rows, levels][:, None] - problem.losses
        usable = (fall > 0) & (extra <= problem.budget - problem.total(levels))
        if not usable.any():
            return levels
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(usable, np.where(extra > 0, fall / extra, np.inf), -np.inf)
        layer, level = np.unravel_index(int(np.argmax(rate)), rate.shape)
        levels[layer] = level
