"""The quadratic losses by which roundings are judged."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.hessian.statistics import Hessian
from qjax.rounding.base import precise

__all__ = ["factor_norms", "proxy_loss", "quadratic", "weight_mse"]


def quadratic(error: Float[Array, "out in"], hessian: Hessian) -> Float[Array, ""]:
    """`tr(H_out E H_in Eᵀ)` (H_out = I when absent)."""
    right = jnp.matmul(error, hessian.input.astype(error.dtype), precision=precise)
    left = error if hessian.output is None else jnp.matmul(hessian.output.astype(error.dtype), error, precision=precise)
    return jnp.sum(left * right)


def factor_norms(hessian: Hessian, rows: int) -> Float[Array, ""]:
    """`‖H_out‖ ‖H_in‖` (Frobenius; `‖I‖ = √rows` for an absent H_out), 1 for 0."""
    norm = jnp.linalg.norm(hessian.input.astype(jnp.float32))
    if hessian.output is not None:
        norm = norm * jnp.linalg.norm(hessian.output.astype(jnp.float32))
    else:
        norm = norm * jnp.float32(rows**0.5)
    return jnp.where(norm > 0, norm, 1)


def proxy_loss(weight: Float[Array, "out in"], rounded: Float[Array, "out in"], hessian: Hessian) -> Float[Array, ""]:
    """Relative proxy loss `tr(H_out E H_in Eᵀ) / tr(H_out W H_in Wᵀ)`, E = W − Ŵ (QuIP, equation 1; 0 for 0/0).

    The scale of H cancels. Dimensionless: 0 is lossless, 1 is as bad as rounding everything to zero.
    """
    loss, reference = quadratic(weight - rounded, hessian), quadratic(weight, hessian)
    return jnp.where(reference > 0, loss / jnp.where(reference > 0, reference, 1), jnp.where(loss > 0, jnp.inf, 0))


def weight_mse(weight: Float[Array, "out in"], rounded: Float[Array, "out in"]) -> Float[Array, ""]:
    """Relative weight error `‖W − Ŵ‖² / ‖W‖²` (0 for 0/0): comparable with a codebook's Gaussian MSE."""
    error, power = jnp.sum(jnp.square(weight - rounded)), jnp.sum(jnp.square(weight))
    return jnp.where(power > 0, error / jnp.where(power > 0, power, 1), jnp.where(error > 0, jnp.inf, 0))
