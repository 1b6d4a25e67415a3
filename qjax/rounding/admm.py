"""The feedback of QuIP's Algorithm 5: least noise under a bound on how far noise may carry a weight, by ADMM."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["bounded_noise"]


@functools.partial(jax.jit, static_argnames=("iterations",))
def bounded_noise(
    hessian: Float[Array, "n n"],
    bound: Float[Array, ""] | float = 1.0,
    rho: Float[Array, ""] | float = 0.1,
    iterations: int = 100,
) -> Float[Array, "n n"]:
    """Z strictly lower triangular: `min tr((I+Z) H (I+Z)ᵀ)` subject to `Σ_i Z_ij² ≤ bound²` for every column j.

    Residuals η of rounding with the feedback `L = (I+Z)⁻¹` give the error `E = η (I+Z)`: the objective is its mean loss
    for residuals of unit variance, and a column's norm is how much of the noise lands on one weight. Without the bound
    the solution is `L⁻¹` of `H = L D Lᵀ`, with objective tr D. The result is feasible after any number of iterations.

    Row i of the first step solves `(2H + ρI) x = −2H e_i + ρ(z_i − u_i)` on its first i entries; the leading corner of
    a Cholesky factor is the factor of the leading corner, so two masked triangular solves do all rows at once.
    H must be positive definite (otherwise NaN); `rho` suits a mean diagonal near 1. `n³` multiplications per iteration.
    Source: QuIP (2307.13304), algorithm 5 and appendix C.
    """
    n = hessian.shape[0]
    eye = jnp.eye(n, dtype=hessian.dtype)
    root = jnp.linalg.cholesky(2 * hessian + rho * eye)

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        z, u = state
        right = rho * (z - u) - 2 * hessian
        half = jax.lax.linalg.triangular_solve(root, right, left_side=False, lower=True, transpose_a=True)
        x = jax.lax.linalg.triangular_solve(root, jnp.tril(half, -1), left_side=False, lower=True)
        moved = x + u
        norm = jnp.linalg.norm(moved, axis=0, keepdims=True)
        z = moved * jnp.minimum(1, bound / jnp.where(norm > 0, norm, 1))
        return z, moved - z

    zero = jnp.zeros_like(hessian)
    return jax.lax.fori_loop(0, iterations, step, (zero, zero))[0]
