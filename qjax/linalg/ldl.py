"""Block LDL factorisation: the feedback matrices of LDLQ and, flipped, of GPTQ."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError, NumericsError

__all__ = ["block_ldl", "block_ldl_host", "block_udu", "factor_blocks", "invert_blocks", "times_blocks", "unit_lower"]

# How many columns `times_blocks` multiplies at a time, as one matrix: three times faster on a CPU than small ones.
_COLUMNS = 128


def check_block(n: int, block: int) -> None:
    """Raises InputError unless `block` divides n."""
    if block < 1 or n % block:
        raise InputError(
            f"block {block} does not divide the {n} columns of the Hessian; allowed are the divisors of {n}; or pad"
        )


def factor_blocks(matrices: Float[Array, "blocks block block"]) -> Float[Array, "blocks block block"]:
    """The Cholesky factors of small symmetric matrices, column by column; NaN where one is not positive definite.

    Not a batched LAPACK call, for the reason given at `invert_blocks`.
    """
    index = jnp.arange(matrices.shape[1])

    def column(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, factor = state
        own = jax.lax.dynamic_index_in_dim(rest, j, axis=2, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(own, j, axis=1)
        own = jnp.where((index >= j).reshape(1, -1), own / jnp.sqrt(pivot), 0)
        rest = rest - jnp.einsum("gi,gj->gij", own, own, precision="highest")
        return rest, jax.lax.dynamic_update_index_in_dim(factor, own, j, axis=2)

    return jax.lax.fori_loop(0, matrices.shape[1], column, (matrices, jnp.zeros_like(matrices)))[1]


def invert_blocks(corners: Float[Array, "blocks block block"]) -> Float[Array, "blocks block block"]:
    """The inverses of lower triangular blocks, row by row: `X_i = (e_i − Σ_{j<i} C_ij X_j) / C_ii`.

    Not a batched triangular solve: on CPU two batched LAPACK calls in one program can deadlock (see orthogonal.py).
    """
    block = corners.shape[1]
    identity = jnp.eye(block, dtype=corners.dtype)

    def row(i: Array, inverse: Array) -> Array:  # rows of `inverse` from i on are still zero
        own = jax.lax.dynamic_index_in_dim(corners, i, axis=1, keepdims=False)
        rest = jax.lax.dynamic_index_in_dim(identity, i, axis=0) - jnp.einsum(
            "gj,gjc->gc", own, inverse, precision="highest"
        )
        pivot = jax.lax.dynamic_index_in_dim(own, i, axis=1)
        return jax.lax.dynamic_update_index_in_dim(inverse, rest / pivot, i, axis=1)

    return jax.lax.fori_loop(0, block, row, jnp.zeros_like(corners))


def unit_lower(
    cholesky: Float[Array, "n n"], block: int
) -> tuple[Float[Array, "n n"], Float[Array, "blocks block block"]]:
    """(L, D) of `H = L D Lᵀ` from the lower Cholesky factor C: `L[:, b] = C[:, b] C[b, b]⁻¹`, `D_b = C[b, b] C[b, b]ᵀ`.

    The diagonal blocks of L are exactly I and everything above them exactly 0. Source: QuIP# (2402.04396), section 4.1.
    """
    n = cholesky.shape[0]
    count = n // block
    if block == 1:
        pivot = jnp.diagonal(cholesky)
        lower, diagonal = (
            cholesky / pivot.reshape(1, n),
            jnp.square(pivot).reshape(n, 1, 1),
        )
        row, column = jnp.arange(n).reshape(n, 1), jnp.arange(n).reshape(1, n)
        return jnp.where(row > column, lower, (row == column).astype(lower.dtype)), diagonal
    index = jnp.arange(count)
    corners = cholesky.reshape(count, block, count, block)[index, :, index, :]
    diagonal = jnp.einsum("bij,bkj->bik", corners, corners, precision="highest")

    def strictly_lower(values: Array, start: Array) -> Array:
        row = jnp.arange(n, dtype=start.dtype).reshape(n, 1)
        column = start + jnp.arange(values.shape[1], dtype=start.dtype).reshape(1, -1)
        return jnp.where(row // block > column // block, values, (row == column).astype(values.dtype))

    return times_blocks(cholesky, invert_blocks(corners), strictly_lower), diagonal


def times_blocks(
    matrix: Float[Array, "m n"],
    blocks: Float[Array, "blocks block block"],
    after: Callable[[Array, Array], Array],
) -> Float[Array, "m n"]:
    """`A blockdiag(B_1 … B_k)`, a hundred columns at a time, so that it can take the place of A in memory.

    `after(columns, index of the first)` is applied to every piece of the product.
    """
    count, block = blocks.shape[:2]
    group = max(g for g in range(1, count + 1) if count % g == 0 and (g == 1 or g * block <= _COLUMNS))
    width = group * block

    def piece(start: Array, columns: Array, factors: Array) -> Array:
        apart = jnp.eye(group, dtype=factors.dtype)[:, None, :, None] * factors[:, :, None, :]
        return after(jnp.matmul(columns, apart.reshape(width, width), precision="highest"), start)

    if group == count:
        return piece(jnp.int32(0), matrix, blocks)

    def step(place: Array, matrix: Array) -> Array:
        start = place * width
        columns = jax.lax.dynamic_slice_in_dim(matrix, start, width, axis=1)
        factors = jax.lax.dynamic_slice_in_dim(blocks, place * group, group)
        return jax.lax.dynamic_update_slice_in_dim(matrix, piece(start, columns, factors), start, axis=1)

    return jax.lax.fori_loop(0, count // group, step, matrix)


@functools.partial(jax.jit, static_argnames=("block",))
def block_ldl(
    hessian: Float[Array, "n n"], block: int = 1
) -> tuple[Float[Array, "n n"], Float[Array, "blocks block block"]]:
    """`H = L D Lᵀ`: L unit block-lower-triangular, D block-diagonal, returned as its n/block diagonal blocks.

    In the dtype of H; `block=1` is the scalar LDL. Where H is not positive definite the results are NaN (see
    `damped_factor`). Raises InputError when `block` does not divide n. Source: QuIP# (2402.04396), section 4.1.
    """
    check_block(hessian.shape[0], block)
    return unit_lower(jnp.linalg.cholesky(hessian), block)


@functools.partial(jax.jit, static_argnames=("block",))
def block_udu(
    hessian: Float[Array, "n n"], block: int = 1
) -> tuple[Float[Array, "n n"], Float[Array, "blocks block block"]]:
    """`H = U D Uᵀ` with U unit block-upper-triangular: the factor of GPTQ's order, left to right.

    `block_ldl` of H flipped in both axes, flipped back. Raises InputError when `block` does not divide n.
    """
    lower, diagonal = block_ldl(jnp.flip(hessian), block)
    return jnp.flip(lower), jnp.flip(diagonal)


def block_ldl_host(
    hessian: Float[np.ndarray, "n n"], block: int = 1
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "blocks block block"]]:
    """`block_ldl` in numpy float64, for matrices that float32 cannot factor.

    Raises InputError when `block` does not divide n, NumericsError when H is not positive definite.
    """
    n = hessian.shape[0]
    check_block(n, block)
    try:
        cholesky = np.linalg.cholesky(np.asarray(hessian, np.float64))
    except np.linalg.LinAlgError as error:
        raise NumericsError(
            f"a Hessian of {n} columns is not positive definite in float64; add damping "
            "(0.01 of its mean diagonal is usual) or use more calibration tokens"
        ) from error
    count = n // block
    index = np.arange(count)
    corners = cholesky.reshape(count, block, count, block)[index, :, index, :]
    # X C_b = A is solved as C_bᵀ Xᵀ = Aᵀ, one batch over the diagonal blocks.
    columns = cholesky.reshape(n, count, block).transpose(1, 2, 0)
    lower = np.linalg.solve(corners.transpose(0, 2, 1), columns).transpose(2, 0, 1).reshape(n, n)
    row, column = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.where(row // block > column // block, lower, np.eye(n)), corners @ corners.transpose(0, 2, 1)
