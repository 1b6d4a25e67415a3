"""Targets that make up for the errors of the blocks before: the best matrix for inputs that have changed."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.linalg.cholesky import invert_lower
from qjax.linalg.damping import damped_factor
from qjax.linalg.kronecker import Hessian
from qjax.linalg.precision import precise

__all__ = ["corrected_weight"]


def corrected_weight(
    weight: Float[Array, "out in"],
    hessian: Hessian,
    strength: Float[Array, ""] | float,
    damping: Float[Array, ""] | float,
) -> Float[Array, "out in"]:
    """`W + s W (C − H)(H + δ I)⁻¹`: the least-squares map from the quantised stream's inputs to the original outputs.

    With x the inputs of the original model and z those of the quantised stream, `H = E[z zᵀ]` and `C = E[x zᵀ]`,
    `E ‖W x − V z‖²` is least at `V = W C H⁻¹`. Rounding V instead of W makes every block correct, as far as a linear
    map can, what went wrong before it. `strength` s = 1 is the full correction, 0 none; less than 1 guards against
    fitting the noise of few calibration tokens. δ is relative to the mean diagonal, and raised until H + δ I factors.

    Source: quantisation error propagation (QEP, 2504.09629) and asymmetric calibration (GPTAQ, 2504.02692).
    """
    moment, cross = (jnp.asarray(x).astype(weight.dtype) for x in (hessian.input, hessian.cross))
    factor = damped_factor(moment, damping, 1)
    live = jnp.diagonal(moment) > 0
    mean = jnp.sum(jnp.diagonal(moment)) / jnp.maximum(jnp.sum(live), 1).astype(weight.dtype)
    # (H + δ I)⁻¹ = Rᵀ R / mean, R the inverse of the Cholesky factor of the normalised matrix
    inverse = invert_lower(factor.lower * jnp.sqrt(factor.diagonal.reshape(1, -1)))
    shift = jnp.matmul(weight, (cross - moment) / jnp.where(mean > 0, mean, 1), precision=precise)
    shift = jnp.matmul(jnp.matmul(shift, inverse.T, precision=precise), inverse, precision=precise)
    # A factorisation that failed is reported by the rounding, which meets the same H.
    return weight + strength * jnp.where(factor.ok, shift, 0)
