"""The quadratic losses by which roundings are judged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.linalg.precision import precise
from qjax.rounding.on_mesh import gathered, over_rows
from qjax.typing import brief

__all__ = ["factor_norms", "proxy_loss", "quadratic", "weight_mse"]


def quadratic(error: Float[Array, "out in"], hessian: Hessian, mesh: Mesh | None = None) -> Float[Array, ""]:
    """`tr(H_out E H_in Eᵀ)` (H_out = I when absent), without H_out with the rows of E over the devices of `mesh`.

    Row by row first, and the rows always in the same order: the sum does not depend on where rows were computed.
    """
    h = hessian.input.astype(error.dtype)
    if hessian.output is not None:
        left = jnp.matmul(hessian.output.astype(error.dtype), error, precision=precise)
        return jnp.sum(left * jnp.matmul(error, h, precision=precise))

    def rows(error: Array, h: Array) -> tuple[Array, None]:
        return jnp.sum(error * jnp.matmul(error, h, precision=precise), axis=1), None

    each = rows(error, h)[0] if mesh is None else gathered(over_rows(rows, mesh, error, h)[0][: error.shape[0]], mesh)
    return jnp.sum(jax.lax.optimization_barrier(each))


def factor_norms(hessian: Hessian, rows: int) -> Float[Array, ""]:
    """`‖H_out‖ ‖H_in‖` (Frobenius; `‖I‖ = √rows` for an absent H_out), 1 for 0."""
    norm = jnp.linalg.norm(hessian.input.astype(jnp.float32))
    if hessian.output is not None:
        norm = norm * jnp.linalg.norm(hessian.output.astype(jnp.float32))
    else:
        norm = norm * jnp.float32(rows**0.5)
    return jnp.where(norm > 0, norm, 1)


def proxy_loss(
    weight: Float[Array, "out in"], rounded: Float[Array, "out in"], hessian: Hessian, mesh: Mesh | None = None
) -> Float[Array, ""]:
    """Relative proxy loss `tr(H_out E H_in Eᵀ) / tr(H_out W H_in Wᵀ)`, E = W − Ŵ (QuIP, equation 1; 0 for 0/0).

    The scale of H cancels. Dimensionless: 0 is lossless, 1 is as bad as rounding everything to zero.
    """
    if not isinstance(hessian, Hessian):
        raise InputError(f"hessian is {brief(hessian)}; it is a Hessian: qjax.Hessian(input)")
    loss, reference = quadratic(weight - rounded, hessian, mesh), quadratic(weight, hessian, mesh)
    return jnp.where(reference > 0, loss / jnp.where(reference > 0, reference, 1), jnp.where(loss > 0, jnp.inf, 0))


def weight_mse(weight: Float[Array, "out in"], rounded: Float[Array, "out in"]) -> Float[Array, ""]:
    """Relative weight error `‖W − Ŵ‖² / ‖W‖²` (0 for 0/0): comparable with a codebook's Gaussian MSE."""
    error, power = jnp.sum(jnp.square(weight - rounded)), jnp.sum(jnp.square(weight))
    return jnp.where(power > 0, error / jnp.where(power > 0, power, 1), jnp.where(error > 0, jnp.inf, 0))
