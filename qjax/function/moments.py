"""Second moments of the inputs of a function's linears: `H_in = E[x xᵀ]`, summed over batches in one compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import NumericsError
from qjax.function.evaluate import Observer, evaluate
from qjax.function.layouts import gram
from qjax.function.program import Program
from qjax.function.walk import Use
from qjax.hessian.products import kahan
from qjax.linalg.kronecker import Hessian
from qjax.linalg.symmetric import mirror

__all__ = ["input_hessians"]


class _Grams(Observer):
    """Keeps `Σ x xᵀ` and the rows that count of the uses in `wanted`."""

    added = True

    def __init__(self, wanted: set[int]):
        self.wanted = wanted

    def wants(self, use: Use) -> bool:
        return use.index in self.wanted

    def see(self, use: Use, rows: Any, slot: Any) -> tuple[Any, Any]:
        return (gram(rows), jnp.full(use.layout.matrix[:-2], use.layout.tokens, jnp.int32)), None


def groups(program: Program) -> dict[int, tuple[int, ...]]:
    """The uses whose moments every linear sums, by its number, each named by the first use with the same inputs."""
    found: dict[int, tuple[int, ...]] = {}
    for use in program.uses:
        number = program.sites.of_use[use.index]
        found[number] = (*found.get(number, ()), program.sites.sources[use.index])
    return found


def batch_moments(program: Program, inputs: Sequence[Any]) -> dict[tuple[int, ...], tuple[Any, Any]]:
    """(`Σ x xᵀ` [*stack, in, in], rows [*stack]) of one batch, by the uses that are summed."""
    wanted = groups(program)
    _, kept = evaluate(
        program.closed,
        inputs,
        program.uses,
        program.sites.of_use,
        _Grams({use for uses in wanted.values() for use in uses}),
    )
    add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
    return {uses: functools.reduce(add, (kept[use] for use in uses)) for uses in set(wanted.values())}


@functools.partial(jax.jit, static_argnames="step", donate_argnums=(1, 2))
def _accumulated(step: Callable[..., Any], total: Any, carry: Any, leaves: Any, inputs: Any) -> Any:
    """The sums with one batch added, in two float32 parts, and whether all that was added is finite."""
    found = step(leaves, inputs)
    sums, fine = {}, {}
    rest: dict[str, Any] = {}
    for name, (product, rows) in found.items():
        after, rest[name] = kahan(total[name][0], carry[name], product)
        sums[name] = after, total[name][1] + rows
        fine[name] = jnp.all(jnp.isfinite(product))
    return sums, rest, fine


def input_hessians(
    programs: Iterator[tuple[Program, list[Any]]], leaves: Sequence[Any], steps: dict[int, Callable[..., Any]]
) -> dict[str, Hessian]:
    """The moments of all linears over batches, given by their programs and flat inputs.

    `steps` keeps what was compiled, by program. Raises NumericsError for inputs that are not finite.
    """
    total: Any = None
    carry: Any = None
    program: Program | None = None
    for number, (program, inputs) in enumerate(programs):
        step = steps.setdefault(id(program), functools.partial(_step, program))
        if total is None:
            shapes = jax.eval_shape(step, list(leaves), inputs)
            total = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
            carry = {name: np.zeros(sums.shape, sums.dtype) for name, (sums, _) in shapes.items()}
        total, carry, fine = _accumulated(step, total, carry, list(leaves), inputs)
        if number % 16 == 0:  # seldom: asking waits for the device
            _check(program, fine, number)
    assert program is not None
    _check(program, {name: np.isfinite(total[name][0]).all() for name in total}, None)
    wanted, names = groups(program), list(program.sites.linears)
    means: dict[Any, Hessian] = {}
    result = {}
    for number, name in enumerate(names):
        key = "+".join(map(str, wanted[number]))
        if key not in means:
            (sums, rows), rest = jax.device_get((total[key], carry[key]))
            means[key] = _mean(sums.astype(np.float64) - rest, rows)
        result[name] = means[key]
    return result


def _step(program: Program, leaves: list[Any], inputs: list[Any]) -> dict[str, Any]:
    found = batch_moments(program, [*leaves, *inputs])
    return {"+".join(map(str, key)): value for key, value in found.items()}


def _mean(total: np.ndarray, rows: np.ndarray) -> Hessian:
    mean = (total / np.maximum(rows, 1)[..., None, None]).astype(np.float32)
    for matrix in mean.reshape(-1, *mean.shape[-2:]):
        mirror(matrix)
    return Hessian(jax.device_put(mean), None, int(np.max(rows)))


def _check(program: Program, fine: Any, number: int | None) -> None:
    broken = {name for name, value in fine.items() if not bool(np.asarray(value))}
    if broken:
        wanted = groups(program)
        names = list(program.sites.linears)
        name = next(names[i] for i in range(len(names)) if "+".join(map(str, wanted[i])) in broken)
        where = "" if number is None else f", in batch {number} or one of the few before it"
        raise NumericsError(
            f"{name}: its inputs on the calibration batches are not finite{where}; drop that batch, check the "
            "parameters before this linear, or compute in float32"
        )
