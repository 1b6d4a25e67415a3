"""The same level for all layers."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from qjax.allocate.base import ALLOCATORS, Problem
from qjax.errors import InputError

__all__ = ["Uniform"]


@ALLOCATORS.register("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform:
    """The level of the least loss among those that, taken by all layers, meet the budget."""

    def __call__(self, problem: Problem) -> Int[np.ndarray, " layers"]:
        """One level for all. Raises InputError where none that all layers have meets the budget."""
        losses = np.where(problem.sizes.sum(axis=0) <= problem.budget, problem.losses.sum(axis=0), np.inf)
        if not np.isfinite(losses).any():
            raise InputError(
                f"method=uniform: no level of all layers meets the budget of {problem.budget:g}; use method=dynamic"
            )
        return np.full(len(problem.losses), int(np.argmin(losses)))
