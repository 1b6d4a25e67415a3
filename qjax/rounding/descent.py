"""Coordinate descent on the proxy loss: passes over the columns that improve the codes of another rounding."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.linalg.damping import damped_factor, unit_mean_diagonal
from qjax.linalg.ldl import factor_blocks, invert_blocks, times_blocks
from qjax.linalg.precision import precise
from qjax.registry import Count, OneOf
from qjax.rounding.base import ROUNDINGS, Coded, Problem, RoundingAlgorithm
from qjax.rounding.columns import column_block, encode_columns, reorder
from qjax.rounding.sweep import Sweep, merge_codes, resweep, widths

__all__ = ["Greedy", "coupling", "damped", "descend", "split_codes"]


def damped(hessian: Float[Array, "n n"], damping: Array | float) -> Float[Array, "n n"]:
    """`Ĥ + damping·I`: the normalised, damped matrix that `damped_factor` factored."""
    matrix, _ = unit_mean_diagonal(hessian)
    return matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def coupling(hessian: Float[Array, "n n"], block: int) -> tuple[Float[Array, "n n"], Float[Array, "blocks g g"]]:
    """(F, C): `F = H blockdiag(H_kk)⁻¹ − I`, and the Cholesky factors of the diagonal blocks, `H_kk = C_k C_kᵀ`.

    `F_jk` is what an error in column block j adds to the best value of block k; its diagonal blocks are exactly 0.
    """
    n = hessian.shape[0]
    count = n // block
    index = jnp.arange(count)
    factor = factor_blocks(hessian.reshape(count, block, count, block)[index, :, index, :])
    root = invert_blocks(factor)
    inverse = jnp.einsum("kab,kac->kbc", root, root, precision=precise)

    def without_diagonal(values: Array, start: Array) -> Array:
        row = jnp.arange(n, dtype=start.dtype).reshape(n, 1)
        column = start + jnp.arange(values.shape[1], dtype=start.dtype).reshape(1, -1)
        return jnp.where(row // block == column // block, 0, values)

    return times_blocks(hessian, inverse, without_diagonal), factor


def split_codes(codes: Shaped[Array, "..."], count: int) -> Shaped[Array, "..."]:
    """Codes `[m/rows, n/cols, ...]` of a matrix -> `[count, m/rows, g/cols, ...]` of its column blocks."""
    return jnp.moveaxis(codes.reshape(codes.shape[0], count, -1, *codes.shape[2:]), 1, 0)


def descend(
    weight: Float[Array, "m n"],
    codes: Shaped[Array, "..."],
    hessian: Float[Array, "n n"],
    codebook: Codebook,
    scaling: Scaling,
    *,
    passes: int,
    index: Int[Array, " n"],
) -> Shaped[Array, "..."]:
    """Better codes `[blocks, m/rows, g/cols, ...]` of the column blocks, by at most `passes` passes over them.

    Right to left, `Ŵ_k ← Q(Ŵ_k + E H_{:,k} H_kk⁻¹)` with E = W − Ŵ always current, wherever that lowers `tr(E H Eᵀ)`;
    ends early when a pass changes nothing. The loss never rises: a scalar's nearest value is its best, but a block's
    nearest codeword is nearest in the Euclidean metric and not in that of H_kk, so it is compared with the old one
    (which QuIP# does not do: it takes all). Source: greedy updates of QuIP (2307.13304), section 4; QuIP# (2402.04396),
    released code.

    Args:
      weight: in the column order of `hessian` and `index`.
      codes: what to start from, one entry per column block; g = n/blocks.
      hessian: damped, so that its diagonal blocks are positive definite.
      index: which column of the original order each column is, for scales per group.
    """
    n, count = weight.shape[1], codes.shape[0]
    block, rows = n // count, codebook.tile[0]
    matrix, factor = coupling(hessian, block)
    levels = (n, *widths(n, block))
    transposed = weight.T

    def scale_of(start: Array) -> tuple[Array, Array]:
        return scaling.at(jax.lax.dynamic_slice_in_dim(index, start, block), weight.dtype)

    def decoded(item: tuple[Array, Array]) -> Array:
        scale, zero = scale_of(item[0])
        return ((codebook.dequantize(item[1]).astype(weight.dtype) - zero) * scale).T

    def one(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        done, _, before, codes = state

        def leaf(part: Array, target: Array, start: Array, context: None) -> tuple[Array, Array]:
            place = start // block
            root = jax.lax.dynamic_index_in_dim(factor, place, keepdims=False)
            old_code = jax.lax.dynamic_index_in_dim(codes, place, keepdims=False)
            values, code = encode_columns(target.T, codebook, *scale_of(start))
            new, old = part - values.T, jax.lax.dynamic_slice_in_dim(before, start, block)

            def cost(error: Array) -> Array:  # of every row tile, up to what does not depend on this block
                residual = jnp.matmul(root.T, target - part + error, precision=precise)
                return jnp.sum(jnp.square(residual).reshape(block, -1, rows), axis=(0, 2))

            better = cost(new) < cost(old)
            new = jnp.where(jnp.repeat(better, rows).reshape(1, -1), new, old)
            return new, jnp.where(better.reshape(-1, *(1 for _ in code.shape[1:])), code, old_code)

        error, better = resweep(Sweep(leaf, reverse=True), levels, transposed, matrix, before)
        return done + 1, jnp.any(better != codes), error, better

    values = jax.lax.map(decoded, (jnp.arange(0, n, block, dtype=jnp.int32), codes)).reshape(n, -1)
    state = (jnp.int32(0), jnp.bool_(True), transposed - values, codes)
    return jax.lax.while_loop(lambda state: (state[0] < passes) & state[1], one, state)[3]


@ROUNDINGS.register("greedy")
@dataclasses.dataclass(frozen=True)
class Greedy(RoundingAlgorithm):
    """Coordinate descent from the nearest codewords (QuIP's `allbal`; see `descend`).

    Attributes:
      passes: the most passes over the columns.
      order: "descending": column blocks in descending order of their part of diag(H), or "natural": right to left.
      block: columns rounded together; None means the codebook's tile width.
    """

    name: ClassVar[str] = "greedy"
    passes: Count = 9
    order: Annotated[str, OneOf("natural", "descending")] = "descending"
    block: Count | None = None

    @property
    def independent_rows(self) -> bool:
        """Rows may be rounded apart."""
        return True

    def round(self, problem: Problem) -> Coded:
        """Codes after the passes, `start` the nearest ones. Raises InputError for a block that does not fit."""
        weight, codebook, scaling = problem.weight, problem.codebook, problem.scaling
        columns = weight.shape[1]
        block = column_block(codebook, self.block, columns)
        h = problem.input_hessian
        factor = damped_factor(h, problem.damping, block)
        h = damped(h, factor.damping)
        nearest = codebook.quantize(scaling.to_codebook_units(weight))
        codes = split_codes(nearest, columns // block)
        if self.order == "natural":
            codes = descend(weight, codes, h, codebook, scaling, passes=self.passes, index=jnp.arange(columns))
        else:  # whole blocks change places, so tiles stay whole; passes go from right to left
            places = jnp.argsort(jnp.sum(jnp.diagonal(h).reshape(-1, block), axis=1))
            index = (places.reshape(-1, 1) * block + jnp.arange(block).reshape(1, -1)).reshape(-1)
            weight, h = reorder(weight, h, index)
            codes = jnp.take(codes, places, axis=0)
            codes = descend(weight, codes, h, codebook, scaling, passes=self.passes, index=index)
            codes = jnp.take(codes, jnp.argsort(places), axis=0)
        return Coded(merge_codes(codes), factor.damping, factor.ok, start=nearest)
