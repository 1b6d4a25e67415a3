"""Column-by-column rounding with linear feedback, as nested scans with lazy updates.

LDLQ and GPTQ are the same recursion. Columns are visited in one direction; the target of a column block k is

    T_k = W_k + Σ_{j visited before} E_jᵀ… in matrix form  T_k = W_k + (E F)_k

with F strictly triangular in visiting order (LDLQ: F = L − I and E = W − Ŵ, right to left; GPTQ: F = −U and E the error
over the pivot, left to right). A block of columns is swept by splitting it into children; a child's target gets the
feedback of its finished siblings in one matrix product. Only the innermost level works column by column, on a few
columns that stay in cache. Matrices are held transposed, [columns, rows], so that a column is contiguous.

A pass of coordinate descent is the same recursion with an F that is not triangular: columns that are still to come
contribute the errors that they had before the pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.linalg.precision import precise

__all__ = ["Sweep", "resweep", "sweep", "widths"]

# A leaf rounds one column block: (weightᵀ, targetᵀ, start, context) -> (errorᵀ, codes)
Leaf = Callable[[Array, Array, Array, Any], tuple[Array, Array]]


def widths(
    columns: int, block: int, group: int | None = None, limits: tuple[int, ...] = (512, 128, 16)
) -> tuple[int, ...]:
    """Nested block widths, widest first, ending in `block`: each divides the one before; `group`, if given, is one."""
    chain: list[int] = []
    outer = columns
    for limit in limits:
        if group is not None and limit <= group < outer and group not in chain:
            chain.append(group)
            outer = group
        inner = max(
            (w for w in range(block, min(limit, outer) + 1, block) if outer % w == 0 and _fits(w, group)), default=block
        )
        if inner < outer and inner > block:
            chain.append(inner)
            outer = inner
    if group is not None and group < outer and group not in chain:
        chain.append(group)
    if not chain or chain[-1] != block:
        chain.append(block)
    # Every place of the widest level has a product of its own in `sweep`: keep it to a few wide pieces, or one.
    return tuple(chain) if chain[0] >= 256 or chain[0] == columns else (columns, *chain)


def _fits(width: int, group: int | None) -> bool:
    return group is None or width % group == 0 or group % width == 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Plan of a sweep.

    Attributes:
      leaf: rounds one column block.
      reverse: from right to left.
      enter_width: the width of the blocks for which `enter` runs, None for none.
      enter: `enter(weightᵀ, targetᵀ, start)`, whose result replaces the leaf's context (GPTQ fits a group's scale on
        the weights as compensated so far); its results are returned stacked.
    """

    leaf: Leaf
    reverse: bool
    enter_width: int | None = None
    enter: Callable[[Array, Array, Array], Any] | None = None


def _feedback(weight: Array, matrix: Array, error: Array) -> Array:
    return weight + jnp.matmul(matrix.T, error, precision=precise)


def _inner(
    plan: Sweep,
    levels: tuple[int, ...],
    weight: Array,
    target: Array,
    matrix: Array,
    start: Array,
    context: Any,
    before: Array | None = None,
) -> tuple[Array, Array, Any]:
    """Sweep one block: (errorᵀ, codes of its column blocks stacked, what `enter` returned, stacked or None).

    `before` is the block's errorᵀ of an earlier pass, None in a first one.
    """
    width = weight.shape[0]
    entered = None
    if plan.enter is not None and width == plan.enter_width:
        context = entered = plan.enter(weight, target, start)
    if len(levels) == 0 or width == levels[-1]:
        error, codes = plan.leaf(weight, target, start, context)
        return error, codes[None], entered
    child = levels[0]
    if child == width:
        return _inner(plan, levels[1:], weight, target, matrix, start, context, before)

    def step(error: Array, offset: Array) -> tuple[Array, tuple[Array, Any]]:
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, offset, child, axis=0)  # noqa: E731
        columns = jax.lax.dynamic_slice_in_dim(matrix, offset, child, axis=1)
        others, old = error, None
        if before is not None:  # the child's own old errors are its own affair
            old = rows(error)
            others = jax.lax.dynamic_update_slice_in_dim(error, jnp.zeros_like(old), offset, axis=0)
        goal = _feedback(rows(target), columns, others)
        part, codes, inside = _inner(plan, levels[1:], rows(weight), goal, rows(columns), start + offset, context, old)
        return jax.lax.dynamic_update_slice_in_dim(error, part, offset, axis=0), (codes, inside)

    offsets = jnp.arange(0, width, child, dtype=jnp.int32)
    first = jnp.zeros_like(target) if before is None else before
    error, (codes, inside) = jax.lax.scan(step, first, offsets, reverse=plan.reverse)
    codes = codes.reshape(-1, *codes.shape[2:])
    if plan.enter_width is not None and child > plan.enter_width:  # flatten the stacks of groups below
        inside = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inside)
    return error, codes, entered if inside is None else inside


def sweep(
    plan: Sweep, levels: tuple[int, ...], weight: Float[Array, "m n"], matrix: Float[Array, "n n"], context: Any = None
) -> tuple[Array, Any]:
    """Round all columns: (codes `[n/block, ...]` of the column blocks in natural order, results of `enter` or None).

    The widest level is one loop whose matrix products have exact, triangular sizes, `m n² / 2` multiplications: a
    switch holds one product for every place of the loop, so the program has one copy of the levels below and not one
    per place.
    """
    transposed = weight.T
    count, top = weight.shape[1], levels[0]
    if top == count:
        _, codes, inside = _inner(plan, levels, transposed, transposed, matrix, jnp.int32(0), context)
        return codes, inside

    def feedback(start: int) -> Callable[[Array, Array], Array]:
        """Feedback of the finished columns, all after (or before) this piece, to its targets."""
        finished = slice(start + top, count) if plan.reverse else slice(0, start)

        def product(matrix: Array, error: Array) -> Array:
            if finished.start == finished.stop:
                return jnp.zeros((top, error.shape[1]), error.dtype)
            return jnp.matmul(matrix[finished, start : start + top].T, error[finished], precision=precise)

        return product

    starts = range(0, count, top)
    branches = [feedback(start) for start in starts]

    def step(error: Array, piece: Array) -> tuple[Array, tuple[Array, Any]]:
        start = piece * top
        part = jax.lax.dynamic_slice_in_dim(transposed, start, top, axis=0)
        goal = part + jax.lax.switch(piece, branches, matrix, error)
        own = jax.lax.dynamic_slice(matrix, (start, start), (top, top))
        found, codes, inside = _inner(plan, levels, part, goal, own, start, context)
        return jax.lax.dynamic_update_slice_in_dim(error, found, start, axis=0), (codes, inside)

    pieces = jnp.arange(len(starts), dtype=jnp.int32)
    _, (codes, inside) = jax.lax.scan(step, jnp.zeros_like(transposed), pieces, reverse=plan.reverse)
    codes = codes.reshape(-1, *codes.shape[2:])
    if plan.enter_width is not None and top > plan.enter_width:  # flatten the stacks of groups below
        inside = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inside)
    return codes, inside


def resweep(
    plan: Sweep,
    levels: tuple[int, ...],
    weight: Float[Array, "n m"],
    matrix: Float[Array, "n n"],
    error: Float[Array, "n m"],
) -> tuple[Float[Array, "n m"], Array]:
    """One more pass over columns that have errors: (errorᵀ, codes `[n/block, ...]`); `m n²` multiplications.

    `T_k = W_k + (E F)_k` with the current errors of all other columns; `matrix` is F, zero in its diagonal blocks. All
    but the codes is transposed.
    """
    error, codes, _ = _inner(plan, levels, weight, weight, matrix, jnp.int32(0), None, error)
    return error, codes


def merge_codes(codes: Array) -> Array:
    """Codes `[blocks, m/rows, g/cols, ...]` of column blocks -> `[m/rows, n/cols, ...]` of the matrix."""
    codes = jnp.moveaxis(codes, 0, 1)
    return codes.reshape(codes.shape[0], codes.shape[1] * codes.shape[2], *codes.shape[3:])
