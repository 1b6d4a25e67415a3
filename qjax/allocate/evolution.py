"""Evolution of an allocation by switches of levels that keep the budget. Source: EvoPress (2410.14649), algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from qjax.allocate.base import Problem, checked
from qjax.allocate.greedy import filled
from qjax.errors import InputError, NumericsError
from qjax.linalg.prng import seed_of

__all__ = ["evolve"]

_SWITCHES = 3  # at most, of a mutation: the smaller of two draws
_TRIES = 100


def evolve(
    levels: int,
    sizes: Any,
    budget: float,
    fitness: Callable[..., float],
    *,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[int, Any]] | None = None,
    key: Any = 0,
    start: Any = None,
) -> tuple[Int[np.ndarray, " layers"], list[float]]:
    """(level of every layer, fitness of the parent after every generation).

    Each generation mutates the parent `offspring` times: some layers rise by a level, others fall until the budget is
    met. The least fit value wins, the parent among them, so that the history never rises.

    Args:
      levels: of every layer, 0 … levels − 1 in order of their sizes.
      sizes: `[layers, levels]`.
      budget: of the sum of sizes.
      fitness: of the levels `[layers]`, lower is better, e.g. a KL divergence; with `stages` it gets the amount, too.
      generations: how many.
      offspring: of each.
      stages: (survivors, amount) in order: offspring are compared on little text first, the survivors on more.
      key: a seed or `jax.random.key`.
      start: levels to begin with; None fills the budget from the least levels up.

    Raises InputError for levels and sizes that do not fit, a budget that they do not meet, and a start beyond it;
    NumericsError for a fitness that is not a number.
    """
    problem = checked(np.zeros_like(np.asarray(sizes, np.float64)), sizes, budget)
    if problem.sizes.shape[1] != levels or (np.diff(problem.sizes, axis=1) < 0).any():
        raise InputError(
            f"sizes have shape {list(problem.sizes.shape)}; they are [layers, levels={levels}], ascending in each layer"
        )
    if generations < 0 or offspring < 1:
        raise InputError(f"generations is {generations} and offspring {offspring}; at least 0 and 1")
    low, high = problem.sizes[:, 0].sum(), problem.sizes[:, -1].sum()
    if not low <= problem.budget <= high:
        raise InputError(f"the budget is {problem.budget:g}; the least levels take {low:g} and the greatest {high:g}")
    parent = _start(problem, start)
    rng = np.random.default_rng(seed_of(key))
    rounds = [(1, None)] if stages is None else list(stages)
    if not rounds or rounds[-1][0] != 1:
        raise InputError(f"stages is {stages!r}; the last keeps one survivor: [(4, 2048), (1, 8192)]")

    def fit(candidate: np.ndarray, amount: Any) -> float:
        value = float(fitness(candidate) if stages is None else fitness(candidate, amount))
        if np.isnan(value):
            raise NumericsError(f"the fitness of levels {candidate.tolist()} is not a number")
        return value

    known = fit(parent, rounds[-1][1])
    history = [known]
    for _ in range(generations):
        candidates = [_mutated(problem, parent, rng) for _ in range(offspring)]
        for survivors, amount in rounds[:-1]:
            ranked = np.argsort([fit(candidate, amount) for candidate in candidates], kind="stable")
            candidates = [candidates[index] for index in ranked[:survivors]]
        for candidate in candidates:
            value = fit(candidate, rounds[-1][1])
            if value < known:
                parent, known = candidate, value
        history.append(known)
    return parent, history


def _start(problem: Problem, start: Any) -> np.ndarray:
    if start is not None:
        found = np.asarray(start, np.int64)
        allowed = found.shape == (len(problem.sizes),) and ((found >= 0) & (found < problem.sizes.shape[1])).all()
        if not allowed or problem.total(found) > problem.budget:
            raise InputError(
                f"start is {found.tolist()}; it is a level for each of {len(problem.sizes)} layers, within the budget"
            )
        return found
    uniform = max(level for level in range(problem.sizes.shape[1]) if problem.sizes[:, level].sum() <= problem.budget)
    rising = Problem(
        np.tile(-np.arange(problem.sizes.shape[1], dtype=float), (len(problem.sizes), 1)), problem.sizes, problem.budget
    )
    return filled(rising, np.full(len(problem.sizes), uniform))


def _mutated(problem: Problem, parent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Levels after a few switches: a layer rises, others fall until the budget is met."""
    top = problem.sizes.shape[1] - 1
    for _ in range(_TRIES):
        child = parent.copy()
        for _ in range(min(rng.integers(1, _SWITCHES + 1), rng.integers(1, _SWITCHES + 1))):
            rising = np.flatnonzero(child < top)
            if not rising.size:
                break
            up = rng.choice(rising)
            child[up] += 1
            while problem.total(child) > problem.budget:
                falling = np.flatnonzero((child > 0) & (np.arange(len(child)) != up))
                if not falling.size:
                    break
                child[rng.choice(falling)] -= 1
        if problem.total(child) <= problem.budget and not np.array_equal(child, parent):
            return child
    return parent.copy()
