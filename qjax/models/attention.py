"""Softmax attention over whole sequences, with a derivative that keeps its products in the dtype of the operands."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax.models.linear import summed
from qjax.typing import HostOrDevice

__all__ = ["attend", "capped"]

_LOWEST = jnp.finfo(jnp.float32).min


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q: Float[Array, "rows queries dim"],
    k: Float[Array, "rows keys dim"],
    v: Float[Array, "rows keys dim"],
    visible: Bool[HostOrDevice, "queries keys"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "rows queries dim"]:
    """`P v`, P = softmax of the scores of the visible keys, in float32 and rounded to the dtype of v.

    Scores are `s = scale · q kᵀ`, or with a cap `cap · tanh(s / cap)`.

    The derivative that JAX makes of it keeps four arrays of the size of P and, in bfloat16, multiplies float32 by
    bfloat16, which costs a CPU as much as all other products of a block's backward pass. This one keeps P alone.
    """
    return summed("bqk,bkd->bqd", _weights(q, k, visible, scale, cap), v)


def _scores(q: Array, k: Array, scale: float) -> Float[Array, "rows queries keys"]:
    return jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32) * scale


def _weights(
    q: Array, k: Array, visible: HostOrDevice, scale: float, cap: float | None
) -> Float[Array, "rows queries keys"]:
    scores = capped(_scores(q, k, scale), cap)
    return jax.nn.softmax(jnp.where(visible[None], scores, _LOWEST), axis=-1).astype(q.dtype)


def capped(x: Array, cap: float | None) -> Array:
    """`cap · tanh(x / cap)`, or x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _forward(
    q: Array, k: Array, v: Array, visible: HostOrDevice, scale: float, cap: float | None
) -> tuple[Array, tuple[Array, ...]]:
    weights = _weights(q, k, visible, scale, cap)
    return summed("bqk,bkd->bqd", weights, v), (q, k, v, weights)


def _backward(
    scale: float, cap: float | None, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, weights = kept
    toward = jnp.einsum("bqd,bkd->bqk", gradient, v, preferred_element_type=jnp.float32)
    exact = weights.astype(jnp.float32)
    scores = exact * (toward - jnp.sum(toward * exact, axis=-1, keepdims=True)) * scale
    if cap is not None:
        scores = scores * (1 - jnp.square(jnp.tanh(_scores(q, k, scale) / cap)))
    scores = scores.astype(q.dtype)
    return summed("bqk,bkd->bqd", scores, k), _over_queries(scores, q), _over_queries(weights, gradient), None


def _over_queries(a: Float[Array, "rows queries keys"], b: Float[Array, "rows queries dim"]) -> Array:
    """`aᵀ b`; aᵀ in memory, because XLA's CPU products of transposed views are slower."""
    return summed("bkq,bqd->bkd", jax.lax.optimization_barrier(jnp.swapaxes(a, 1, 2)), b)


attend.defvjp(_forward, _backward)
