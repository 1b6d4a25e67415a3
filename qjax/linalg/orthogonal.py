"""Random orthogonal matrices: Haar, and QuIP's two-stage products of small ones."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qjax.errors import InputError

__all__ = [
    "TwoStage",
    "balanced_factors",
    "haar_orthogonal",
    "two_stage",
    "two_stage_transform",
]

_PANEL = 32

TwoStage = tuple[Array, Array, Array, Array]
"""(inner [q|1, p, p], outer [p|1, q, q], before [n], after [n]): orthogonal factors, and permutations as indices."""


def _in_panel(panel: Float[Array, "count n width"]) -> Float[Array, "count n width"]:
    """Gram–Schmidt on the columns of every panel, each projection done twice."""

    def column(j: Array, basis: Array) -> Array:
        vector = jax.lax.dynamic_index_in_dim(panel, j, axis=2, keepdims=False)
        for _ in range(2):  # columns of `basis` from j on are still zero
            along = jnp.einsum("cnw,cn->cw", basis, vector, precision="highest")
            vector = vector - jnp.einsum("cnw,cw->cn", basis, along, precision="highest")
        vector = vector / jnp.linalg.norm(vector, axis=1, keepdims=True)
        return jax.lax.dynamic_update_index_in_dim(basis, vector, j, axis=2)

    return jax.lax.fori_loop(0, panel.shape[2], column, jnp.zeros_like(panel))


def _orthogonalised(gaussian: Float[Array, "count n n"]) -> Float[Array, "count n n"]:
    """Q of the QR factorisation with diag(R) > 0, by panels.

    Not `jnp.linalg.qr`: on CPU a batched LAPACK call waits, on a thread of XLA's pool, for tasks in the same pool
    (jaxlib 0.10), so two of them in one program on two cores can wait for ever. To rotate both sides is such a program.
    """
    done = gaussian[:, :, :0]
    for start in range(0, gaussian.shape[2], _PANEL):
        panel = gaussian[:, :, start : start + _PANEL]
        for _ in range(2):  # once loses orthogonality when a panel is ill conditioned, twice is enough
            along = jnp.einsum("cnk,cnw->ckw", done, panel, precision="highest")
            panel = _in_panel(panel - jnp.einsum("cnk,ckw->cnw", done, along, precision="highest"))
        done = jnp.concatenate([done, panel], axis=2)
    return done


@functools.partial(jax.jit, static_argnames=("count", "n"))
def haar_orthogonal(key: Key[Array, ""], count: int, n: int) -> Float[Array, "count n n"]:
    """`count` independent Haar-distributed orthogonal matrices of size n, float32.

    Q of the QR factorisation of a Gaussian matrix with diag(R) positive; with another convention for the signs, as
    LAPACK's, the distribution is not uniform (Mezzadri, math-ph/0609050).
    """
    return _orthogonalised(jax.random.normal(key, (count, n, n), jnp.float32))


def balanced_factors(n: int) -> tuple[int, int]:
    """(p, q) with pq = n: of n's prime factors in ascending order those at even places make p, those at odd places q.

    4096 gives (64, 64), 1536 gives (32, 48), a prime n gives (n, 1). Source: QuIP (2307.13304), section 4.
    """
    factors, rest, divisor = [], n, 2
    while rest > 1:
        if divisor * divisor > rest:
            divisor = rest
        while rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        divisor += 1
    return math.prod(factors[::2]), math.prod(factors[1::2])


@functools.partial(jax.jit, static_argnames=("n", "single"))
def two_stage(key: Key[Array, ""], n: int, single: bool = False) -> TwoStage:
    """The factors of a random orthogonal matrix of size n = pq.

    With `single` one p×p and one q×q factor (a Kronecker product); otherwise q independent p×p and p independent q×q
    factors (a two-stage butterfly). Source: QuIP (2307.13304), section 4 and the block mode of its released code.
    """
    p, q = balanced_factors(n)
    inner, outer = (1, 1) if single else (q, p)
    values, before, after = jax.random.split(key, 3)
    # One stream for both factors: its transformation to a Gaussian is most of the time to compile this.
    gaussian = jax.random.normal(values, (inner * p * p + outer * q * q,), jnp.float32)
    return (
        _orthogonalised(gaussian[: inner * p * p].reshape(inner, p, p)),
        _orthogonalised(gaussian[inner * p * p :].reshape(outer, q, q)),
        # 32-bit sort keys: ties (n²/2³³ of them) are broken by position, and the permutation stays valid.
        jnp.argsort(jax.random.bits(before, (n,), jnp.uint32)),
        jnp.argsort(jax.random.bits(after, (n,), jnp.uint32)),
    )


def _inverse(permutation: Array) -> Array:
    return jnp.zeros_like(permutation).at[permutation].set(jnp.arange(permutation.size, dtype=permutation.dtype))


@functools.partial(jax.jit, static_argnames=("transpose",))
def two_stage_transform(
    x: Float[Array, "*batch n"], factors: TwoStage, transpose: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ R` along the last axis, `R = P_before · (I_q ⊗ A)(B ⊗ I_p) · P_after`, or `x @ Rᵀ`.

    In the butterfly every diagonal block of the two middle factors has values of its own. n(p + q) operations per row,
    in at least float32; returns the dtype of x. Raises InputError when n is not the factors' size.
    """
    inner, outer, before, after = factors
    p, q, n = inner.shape[-1], outer.shape[-1], x.shape[-1]
    if p * q != n:
        raise InputError(
            f"orthogonal factors of sizes {p} and {q} do not fit a dimension of {n}; their product must equal it"
        )
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    inner = jnp.broadcast_to(inner, (q, p, p)).astype(compute)
    outer = jnp.broadcast_to(outer, (p, q, q)).astype(compute)
    first, last = (after, before) if transpose else (before, after)
    y = x.astype(compute).reshape(-1, n)
    y = (y[:, _inverse(first)] if transpose else y[:, first]).reshape(-1, q, p)
    if transpose:
        y = jnp.einsum("bij,jki->bkj", y, outer, precision="highest")
        y = jnp.einsum("bij,ikj->bik", y, inner, precision="highest")
    else:
        y = jnp.einsum("bij,ijk->bik", y, inner, precision="highest")
        y = jnp.einsum("bij,jik->bkj", y, outer, precision="highest")
    y = y.reshape(-1, n)
    y = y[:, _inverse(last)] if transpose else y[:, last]
    return y.reshape(x.shape).astype(x.dtype)
