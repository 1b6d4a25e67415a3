"""Low-rank operators and sums whose rows or columns lie on different devices, beside `matrices`.

The thin factor that the cut does not touch is on every device; a row-parallel term sums its r values, not its outputs.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.matrix.low_rank import LowRank
from qjax.matrix.sums import Sum
from qjax.tensor_parallel.matrices import AXIS, Stacked, column_parallel, row_parallel
from qjax.typing import Leaf, pytree, static

__all__ = ["ColumnParallelLowRank", "ParallelSum", "RowParallelLowRank"]


@pytree
class ColumnParallelLowRank:
    """`scale · Bᵢ A` with the rows Bᵢ of B on device i; A, of few values, is on every device."""

    b: Stacked
    a: Leaf
    scale: float = static()

    @property
    def collectives(self) -> dict[str, int]:
        """Nothing is communicated."""
        return {}

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """This device's outputs, in the dtype of x; inside `shard_map`."""
        return LowRank(self.b.own(), self.a, self.scale).matmul(x)


@pytree
class RowParallelLowRank:
    """`scale · B A` with the columns Aᵢ of A on device i: `x Aᵀ = Σ xᵢ Aᵢᵀ`, of r values, is summed in float32."""

    b: Leaf
    a: Stacked
    scale: float = static()

    @property
    def collectives(self) -> dict[str, int]:
        """Values per token by collective."""
        return {"all-reduce": self.b.shape[1]}

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """All outputs, in the dtype of x, of this device's inputs and those of the others; inside `shard_map`."""
        low = jnp.einsum("...i,ri->...r", x, self.a.own().astype(x.dtype), preferred_element_type=jnp.float32)
        low = jax.lax.psum(low, AXIS).astype(x.dtype)
        return self.scale * jnp.einsum("...r,or->...o", low, self.b.astype(x.dtype))


@pytree
class ParallelSum:
    """A sum of operators, each of them shared out in the same way."""

    terms: tuple[Any, ...]

    @property
    def collectives(self) -> dict[str, int]:
        """Values per token by collective."""
        return dict(sum((Counter(term.collectives) for term in self.terms), Counter()))

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The sum of the terms' outputs, in the dtype of x; inside `shard_map`."""
        return functools.reduce(operator.add, (term.matmul(x) for term in self.terms))


@column_parallel.register(LowRank)
def _column_parallel_low_rank(matrix: LowRank, count: int, packed: bool) -> ColumnParallelLowRank:
    parts = np.split(np.asarray(matrix.b), count)
    return ColumnParallelLowRank(Stacked(np.stack(parts)), matrix.a, matrix.scale)


@row_parallel.register(LowRank)
def _row_parallel_low_rank(matrix: LowRank, count: int, packed: bool) -> RowParallelLowRank:
    parts = np.split(np.asarray(matrix.a), count, axis=1)
    return RowParallelLowRank(matrix.b, Stacked(np.stack(parts)), matrix.scale)


@column_parallel.register(Sum)
def _column_parallel_sum(matrix: Sum, count: int, packed: bool) -> ParallelSum:
    return ParallelSum(tuple(column_parallel(term, count, packed) for term in matrix.terms))


@row_parallel.register(Sum)
def _row_parallel_sum(matrix: Sum, count: int, packed: bool) -> ParallelSum:
    return ParallelSum(tuple(row_parallel(term, count, packed) for term in matrix.terms))
