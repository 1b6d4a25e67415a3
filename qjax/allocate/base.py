"""The problem of allocation, checked once, and the table of its solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from qjax.errors import InputError
from qjax.registry import Registry

__all__ = ["ALLOCATORS", "Allocator", "Problem", "checked", "solve"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One level for every layer, of the least sum of losses, whose sizes add up to at most the budget.

    Attributes:
      losses: of every layer at every level, in units that add up; infinite for a level that a layer does not have.
      sizes: likewise, e.g. stored bits.
      budget: of the sum of sizes.
    """

    losses: Float[np.ndarray, "layers levels"]
    sizes: Float[np.ndarray, "layers levels"]
    budget: float

    def total(self, levels: Int[np.ndarray, " layers"]) -> float:
        """The sum of the sizes of these levels."""
        return float(np.take_along_axis(self.sizes, levels[:, None], axis=1).sum())

    def loss(self, levels: Int[np.ndarray, " layers"]) -> float:
        """The sum of the losses of these levels."""
        return float(np.take_along_axis(self.losses, levels[:, None], axis=1).sum())


class Allocator(Protocol):
    """A solver of `Problem`s."""

    def __call__(self, problem: Problem) -> Int[np.ndarray, " layers"]:
        """The level of every layer."""
        ...


ALLOCATORS: Registry[Allocator] = Registry("allocator", "qjax.allocate.ALLOCATORS")


def solve(
    losses: Any,
    sizes: Any,
    budget: float,
    method: str = "dynamic",
    *,
    tied: Sequence[Sequence[int]] = (),
    **options: Any,
) -> Int[np.ndarray, " layers"]:
    """The level of every layer, by one of `ALLOCATORS`.

    Args:
      losses: `[layers, levels]`, in units that add up over layers.
      sizes: `[layers, levels]`, e.g. stored bits.
      budget: of the sum of sizes.
      method: "dynamic" (exact up to steps of the budget), "greedy" or "uniform".
      tied: groups of layers that share one level.
      options: of the method.

    Raises InputError for shapes that do not fit, values that are no losses or sizes, and a budget that no choice meets
    or that the dearest choice does not use up.
    """
    problem = checked(losses, sizes, budget)
    layers = len(problem.losses)
    groups = _groups(tied, layers)
    joint = Problem(
        np.stack([problem.losses[group].sum(0) for group in groups]),
        np.stack([problem.sizes[group].sum(0) for group in groups]),
        problem.budget,
    )
    _check_budget(joint)
    found = ALLOCATORS.make(method, **options)(joint)
    levels = np.empty(layers, np.int64)
    for group, level in zip(groups, found, strict=True):
        levels[group] = level
    return levels


def checked(losses: Any, sizes: Any, budget: float) -> Problem:
    """The problem. Raises InputError for shapes that do not fit and values that are no losses or sizes."""
    losses, sizes = np.asarray(losses, np.float64), np.asarray(sizes, np.float64)
    if losses.ndim != 2 or losses.shape != sizes.shape or 0 in losses.shape:
        raise InputError(
            f"losses have shape {list(losses.shape)} and sizes {list(sizes.shape)}; both are [layers, levels]"
        )
    if np.isnan(losses).any() or (losses == -np.inf).any() or np.isinf(losses).all(axis=1).any():
        raise InputError("losses have NaN or -inf, or a layer without a finite one; inf stands for a level not there")
    if not np.isfinite(sizes).all() or (sizes < 0).any():
        raise InputError("sizes have negative or infinite entries; a size is a number of bits, bytes or microseconds")
    return Problem(losses, sizes, float(budget))


def _check_budget(problem: Problem) -> None:
    there = np.isfinite(problem.losses)
    if not there.any(axis=1).all():
        raise InputError("tied layers have no level that all of them have")
    cheapest = np.where(there, problem.sizes, np.inf).min(axis=1).sum()
    dearest = np.where(there, problem.sizes, -np.inf).max(axis=1).sum()
    if not cheapest <= problem.budget <= dearest:
        raise InputError(
            f"the budget is {problem.budget:g}; the cheapest levels take {cheapest:g} and the dearest {dearest:g}: "
            "choose one between, or add levels"
        )


def _groups(tied: Sequence[Sequence[int]], layers: int) -> list[list[int]]:
    """All layers in groups, those that are tied to no other by themselves."""
    groups = [list(map(int, group)) for group in tied]
    flat = [layer for group in groups for layer in group]
    if len(set(flat)) != len(flat) or any(not 0 <= layer < layers for layer in flat):
        raise InputError(f"tied is {groups}; it is groups of different layers from 0 to {layers - 1}")
    return [group for group in groups if group] + [[layer] for layer in range(layers) if layer not in set(flat)]
