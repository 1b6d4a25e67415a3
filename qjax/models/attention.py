"""Softmax attention over whole sequences, with a derivative that keeps its products in the dtype of the operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax.models.linear import summed
from qjax.typing import HostOrDevice

__all__ = ["attend"]

_LOWEST = jnp.finfo(jnp.float32).min


@jax.custom_vjp
def attend(
    q: Float[Array, "rows queries dim"],
    k: Float[Array, "rows keys dim"],
    v: Float[Array, "rows keys dim"],
    visible: Bool[HostOrDevice, "queries keys"],
) -> Float[Array, "rows queries dim"]:
    """`P v`, P = softmax of `q kᵀ / √dim` over the visible keys, in float32 and rounded to the dtype of v.

    The derivative that JAX makes of it keeps four arrays of the size of P and, in bfloat16, multiplies float32 by
    bfloat16, which costs a CPU as much as all other products of a block's backward pass. This one keeps P alone.
    """
    return summed("bqk,bkd->bqd", _weights(q, k, visible), v)


def _weights(q: Array, k: Array, visible: HostOrDevice) -> Float[Array, "rows queries keys"]:
    scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32) * q.shape[2] ** -0.5
    return jax.nn.softmax(jnp.where(visible[None], scores, _LOWEST), axis=-1).astype(q.dtype)


def _forward(q: Array, k: Array, v: Array, visible: HostOrDevice) -> tuple[Array, tuple[Array, ...]]:
    weights = _weights(q, k, visible)
    return summed("bqk,bkd->bqd", weights, v), (q, k, v, weights)


def _backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights = kept
    toward = jnp.einsum("bqd,bkd->bqk", gradient, v, preferred_element_type=jnp.float32)
    exact = weights.astype(jnp.float32)
    scores = exact * (toward - jnp.sum(toward * exact, axis=-1, keepdims=True)) * q.shape[2] ** -0.5
    scores = scores.astype(q.dtype)
    return summed("bqk,bkd->bqd", scores, k), _over_queries(scores, q), _over_queries(weights, gradient), None


def _over_queries(a: Float[Array, "rows queries keys"], b: Float[Array, "rows queries dim"]) -> Array:
    """`aᵀ b`; aᵀ in memory, because XLA's CPU products of transposed views are slower."""
    return summed("bkq,bqd->bkd", jax.lax.optimization_barrier(jnp.swapaxes(a, 1, 2)), b)


attend.defvjp(_forward, _backward)
