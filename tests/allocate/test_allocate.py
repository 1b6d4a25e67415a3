"""Allocation against all choices, on problems that are small enough for that."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax import allocate
from qjax.allocate.base import Problem
from qjax.errors import InputError, NumericsError


def problem(layers, levels, seed, whole=True):
    """Losses that fall and sizes that rise with the level, as those of layers of different widths do."""
    rng = np.random.default_rng(seed)
    width = rng.integers(1, 5, (layers, 1))
    steps = rng.integers(1, 4, (layers, levels)) if whole else rng.uniform(0.5, 2, (layers, levels))
    sizes = width * np.cumsum(steps, axis=1).astype(float)
    losses = np.sort(rng.exponential(size=(layers, levels)), axis=1)[:, ::-1] * rng.uniform(0.1, 10, (layers, 1))
    share = rng.uniform(0, 1)
    budget = (1 - share) * sizes[:, 0].sum() + share * sizes[:, -1].sum()
    return Problem(losses, sizes, float(np.floor(budget) if whole else budget))


def best(given):
    """The least loss of all choices within the budget."""
    layers, levels = given.losses.shape
    choices = (np.asarray(choice) for choice in itertools.product(range(levels), repeat=layers))
    return min(given.loss(choice) for choice in choices if given.total(choice) <= given.budget)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_dynamic_programming_is_exact_for_whole_sizes(layers, levels, seed):
    given = problem(layers, levels, seed)
    found = allocate.solve(given.losses, given.sizes, given.budget)
    assert given.total(found) <= given.budget
    assert given.loss(found) == pytest.approx(best(given), rel=1e-12)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10**6), st.sampled_from(["dynamic", "greedy"]))
def test_any_sizes_keep_the_budget_and_are_near_the_best(layers, levels, seed, method):
    given = problem(layers, levels, seed, whole=False)
    found = allocate.solve(given.losses, given.sizes, given.budget, method)
    assert given.total(found) <= given.budget * (1 + 1e-12)
    least = best(given)
    assert given.loss(found) >= least - 1e-9
    # Steps of the budget cost what sizes a few steps smaller would: the best within a budget of 0.1% less is met.
    if method == "dynamic":
        smaller = Problem(given.losses, given.sizes, given.budget * 0.999)
        if smaller.budget >= given.sizes[:, 0].sum():
            assert given.loss(found) <= best(smaller) + 1e-9


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 10**6))
def test_more_budget_is_never_worse_and_uniform_never_better(layers, levels, seed):
    given = problem(layers, levels, seed)
    small, large = given.sizes[:, 0].sum(), given.sizes[:, -1].sum()
    losses = [
        given.loss(allocate.solve(given.losses, given.sizes, budget)) for budget in np.linspace(small, large, 5).round()
    ]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    uniform = allocate.solve(given.losses, given.sizes, given.budget, "uniform")
    assert len(set(uniform)) == 1 and given.total(uniform) <= given.budget
    assert given.loss(allocate.solve(given.losses, given.sizes, given.budget)) <= given.loss(uniform) + 1e-9


def test_tied_layers_share_a_level():
    given = problem(6, 3, 0)
    found = allocate.solve(given.losses, given.sizes, given.budget, tied=[(0, 3), (1, 2, 5)])
    assert found[0] == found[3] and found[1] == found[2] == found[5] and given.total(found) <= given.budget
    choices = (np.asarray(c) for c in itertools.product(range(3), repeat=6) if c[0] == c[3] and c[1] == c[2] == c[5])
    assert given.loss(found) == pytest.approx(min(given.loss(c) for c in choices if given.total(c) <= given.budget))


def test_the_budget_of_a_model_of_two_hundred_layers_is_used_up():
    rng = np.random.default_rng(0)
    sizes = np.cumsum(rng.uniform(0.5, 2, (210, 7)), axis=1) * rng.integers(10**5, 10**6, (210, 1))
    losses = np.sort(rng.exponential(size=(210, 7)), axis=1)[:, ::-1]
    budget = 0.6 * sizes[:, 0].sum() + 0.4 * sizes[:, -1].sum()
    found = allocate.solve(losses, sizes, budget)
    assert 0.999 * budget < np.take_along_axis(sizes, found[:, None], axis=1).sum() <= budget


def test_evolution_finds_the_best_of_a_sum_and_never_loses_what_it_has():
    given = problem(5, 3, 4)
    found, history = allocate.evolve(3, given.sizes, given.budget, given.loss, generations=60, offspring=8, key=1)
    assert given.total(found) <= given.budget
    assert history == sorted(history, reverse=True) and len(history) == 61
    assert given.loss(found) == pytest.approx(best(given), rel=1e-12) and history[-1] == given.loss(found)
    again, _ = allocate.evolve(3, given.sizes, given.budget, given.loss, generations=60, offspring=8, key=1)
    assert np.array_equal(found, again)


def test_stages_ask_for_little_text_first():
    given, asked = problem(4, 3, 2), []

    def fitness(levels, amount):
        asked.append(amount)
        return given.loss(levels)

    allocate.evolve(
        3, given.sizes, given.budget, fitness, generations=2, offspring=6, stages=[(2, "little"), (1, "much")]
    )
    assert asked.count("little") == 12 and asked.count("much") == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.0}, "the budget is 1; the cheapest levels take .* and the dearest"),
        ({"budget": 1e9}, "the cheapest levels take .* and the dearest"),
        ({"losses": np.full((3, 2), np.nan)}, "losses have NaN"),
        ({"sizes": np.full((3, 2), -1.0)}, "sizes have negative"),
        ({"sizes": np.ones((3, 3))}, r"losses have shape \[3, 2\] and sizes \[3, 3\]"),
        ({"tied": [(0, 1), (1, 2)]}, "groups of different layers"),
        ({"method": "dynamik"}, "unknown allocator 'dynamik'.*did you mean dynamic"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_problems_are_refused(changes, message):
    sizes = np.array([[1.0, 2.0]] * 3)
    with pytest.raises(InputError, match=message):
        allocate.solve(**{"losses": 1 / sizes, "sizes": sizes, "budget": 4.0, **changes})


def test_bad_evolutions_are_refused():
    sizes = np.array([[1.0, 2.0]] * 3)
    options = {"generations": 1, "offspring": 2}
    with pytest.raises(InputError, match="the least levels take 3 and the greatest 6"):
        allocate.evolve(2, sizes, 2.0, sum, **options)
    with pytest.raises(InputError, match="within the budget"):
        allocate.evolve(2, sizes, 4.0, sum, start=[1, 1, 1], **options)
    with pytest.raises(InputError, match="ascending"):
        allocate.evolve(2, sizes[:, ::-1], 4.0, sum, **options)
    with pytest.raises(NumericsError, match="fitness of levels"):
        allocate.evolve(2, sizes, 4.0, lambda levels: float("nan"), **options)
