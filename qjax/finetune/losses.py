"""Losses of a model's output against its teacher or the next token, for one chunk of positions at a time.

The logits of a batch are the largest arrays of a training step. Here they exist for one chunk, and the gradient with
respect to the hidden states is taken in the forward pass, so the backward pass needs neither logits nor a second
product with the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.models import transformer
from qjax.models.config import ModelConfig

__all__ = ["KINDS", "chunked_mean", "next_token", "soft_targets", "topk_targets", "topk_teacher"]

KINDS = ("kl", "next_token")
PerPosition = Callable[..., Array]


def soft_targets(
    own: Float[Array, "positions vocab"], teacher: Float[Array, "positions vocab"]
) -> Float[Array, " positions"]:
    """`KL(p ‖ q) = Σ p (log p − log q)` in nats of the teacher's p and the student's q, both given as logits.

    Source: end-to-end tuning of QuIP# (2402.04396); its cross entropy differs by the teacher's entropy, a constant.
    """
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(own, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def topk_targets(
    own: Float[Array, "positions vocab"], index: Int[Array, "positions k"], log_p: Float[Array, "positions k"]
) -> Float[Array, " positions"]:
    """The KL of the distributions over k+1 events: the teacher's k likeliest tokens, and all others as one.

    Merging events never raises a divergence: it is a lower bound of `soft_targets`.
    """
    log_q = jnp.take_along_axis(jax.nn.log_softmax(own, axis=-1), index, axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    rest_p = jnp.clip(1 - jnp.sum(p, axis=-1), 1e-7)
    rest_q = jnp.clip(1 - jnp.sum(q, axis=-1), 1e-7)
    return jnp.sum(p * (log_p - log_q), axis=-1) + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))


def next_token(own: Float[Array, "positions vocab"], target: Int[Array, " positions"]) -> Float[Array, " positions"]:
    """`−log q(target)` in nats."""
    return -jnp.take_along_axis(jax.nn.log_softmax(own, axis=-1), target[:, None], axis=-1)[:, 0]


def _split(x: Array, chunk: int) -> Array:
    padding = -x.shape[0] % chunk
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_mean(function: PerPosition, chunk: int, head: Any, x: Array, targets: Any, constants: Any) -> Array:
    """Mean over positions of `function(head, x, targets, constants)`, evaluated for `chunk` positions at a time.

    Args:
      function: `(head, [chunk, width], targets of the chunk, constants) -> [chunk]`.
      head: parameters with a gradient.
      x: `[positions, width]`, with a gradient.
      targets: a pytree of `[positions, …]`.
      constants: a pytree that every chunk sees whole. Both have no gradient.
    """
    return _forward(function, chunk, head, x, targets, constants, gradient=False)[0]


def _forward(
    function: PerPosition, chunk: int, head: Any, x: Array, targets: Any, constants: Any, gradient: bool
) -> tuple[Array, Any]:
    count = x.shape[0]
    chunk = min(chunk, count)
    parts = jax.tree.map(lambda leaf: _split(leaf, chunk), (x, targets))
    weights = _split(jnp.full(count, 1 / count, jnp.float32), chunk)

    def loss(head: Any, x: Array, targets: Any, weight: Array) -> Array:
        return jnp.sum(function(head, x, targets, constants) * weight)

    def step(carry: Any, part: Any) -> tuple[Any, Any]:
        (x, targets), weight = part
        if not gradient:
            return carry + loss(head, x, targets, weight), None
        value, (d_head, d_x) = jax.value_and_grad(loss, argnums=(0, 1))(head, x, targets, weight)
        return (carry[0] + value, jax.tree.map(jnp.add, carry[1], d_head)), d_x

    zero = jnp.zeros((), jnp.float32)
    if not gradient:
        return jax.lax.scan(step, zero, (parts, weights))[0], None
    zeros = jax.tree.map(jnp.zeros_like, head)
    (total, d_head), d_x = jax.lax.scan(step, (zero, zeros), (parts, weights))
    return total, (d_head, d_x.reshape(-1, x.shape[1])[:count])


def _fwd(
    function: PerPosition, chunk: int, head: Any, x: Array, targets: Any, constants: Any
) -> tuple[Array, tuple[Any, Array]]:
    return _forward(function, chunk, head, x, targets, constants, gradient=True)


def _bwd(function: PerPosition, chunk: int, gradients: tuple[Any, Array], g: Array) -> tuple[Any, ...]:
    d_head, d_x = jax.tree.map(lambda leaf: leaf * g.astype(leaf.dtype), gradients)
    return d_head, d_x, None, None  # None: no gradient


chunked_mean.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnames=("config", "k"))
def topk_teacher(
    head: dict[str, Any], states: Float[Array, "batch length width"], config: ModelConfig, k: int
) -> tuple[Int[Array, "batch length k"], Float[Array, "batch length k"]]:
    """The teacher's k likeliest tokens at every position and their log probabilities."""

    def one(row: Array) -> tuple[Array, Array]:
        log_p = jax.nn.log_softmax(transformer.logits(head, row[None], config)[0], axis=-1)
        values, index = jax.lax.top_k(log_p, k)
        return index, values

    return jax.lax.map(one, states)
