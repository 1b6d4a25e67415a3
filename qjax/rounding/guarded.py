"""LDLQ for finite grids: feedback that cannot push weights far beyond the outermost levels (QuIP's Algorithm 5)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.linalg.damping import damped_factor
from qjax.registry import Count, NotNegative, Positive
from qjax.rounding.base import ROUNDINGS, Coded, Problem, RoundingAlgorithm
from qjax.rounding.descent import damped
from qjax.rounding.ldlq import feedback_codes
from qjax.rounding.sweep import merge_codes

__all__ = ["GuardedLDLQ", "bounded_noise"]


@ROUNDINGS.register("ldlq_guarded")
@dataclasses.dataclass(frozen=True)
class GuardedLDLQ(RoundingAlgorithm):
    """LDLQ with `L = (I + Z)⁻¹`, Z from `bounded_noise`: the clamp-guarded variant with a bound on finite grids.

    The published iteration `ŵ ← clamp(⌊ŵ + (w − ŵ)L + u⌋)` ends where every column has seen the final errors of those
    after it, and L − I is strictly lower: one sweep from right to left is that fixed point.
    Source: QuIP (2307.13304), algorithm 5, theorem 7.

    Attributes:
      slack: c; a column of Z has at most the norm √c, so rounding noise on one weight at most √(1 + c) times that of
        one rounding. A large c gives LDLQ itself.
      iterations: of ADMM.
      rho: the penalty of ADMM.
      stochastic: the theorem's unbiased rounding (needs a key); False rounds to the nearest, which is usually better.
    """

    name: ClassVar[str] = "ldlq_guarded"
    slack: NotNegative = 1.0
    iterations: Count = 100
    rho: Positive = 0.1
    stochastic: bool = True

    @property
    def independent_rows(self) -> bool:
        """Whether rows may be rounded apart; the random numbers of stochastic rounding are drawn for whole columns."""
        return not self.stochastic

    @property
    def randomised_by(self) -> str | None:
        """The option `stochastic`."""
        return "rounding=ldlq_guarded (stochastic=true)" if self.stochastic else None

    def round(self, problem: Problem) -> Coded:
        """Codes of a codebook with 1×1 tiles. Raises InputError for others."""
        weight, codebook = problem.weight, problem.codebook
        if codebook.tile != (1, 1):
            raise InputError(
                f"rounding=ldlq_guarded is for finite scalar grids and the tiles of this codebook are {codebook.tile}; "
                "use rounding=ldlq"
            )
        n = weight.shape[1]
        h = problem.input_hessian
        factor = damped_factor(h, problem.damping)
        noise = bounded_noise(damped(h, factor.damping), self.slack**0.5, self.rho, self.iterations)
        eye = jnp.eye(n, dtype=weight.dtype)
        lower = jax.lax.linalg.triangular_solve(eye + noise, eye, left_side=True, lower=True, unit_diagonal=True)
        codes = feedback_codes(weight, lower, codebook, problem.scaling, block=1, index=jnp.arange(n), key=problem.key)
        return Coded(merge_codes(codes), factor.damping, factor.ok)


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
