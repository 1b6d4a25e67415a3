"""Products with the matrices of several experts at once, each for the tokens that are routed to it.

Every expert is a linear of its own, with its own name, Hessian and record; `affine_each` computes those of one
projection together. Every expert sees every token, and what a token did not choose has the weight 0: as exact as
sending each token to its experts alone, and without shapes that depend on the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qjax.models.linear import Operator, answered, product, route

__all__ = ["affine_each", "mixed", "numbered", "shares"]


def shares(
    logits: Float[Array, "batch length experts"], active: int, renormalised: bool
) -> Float[Array, "batch length experts"]:
    """The weight of every expert for every token, float32: softmax, the `active` largest, 0 for the others.

    With `renormalised` those that are kept add up to 1. Of equal ones the first are kept.
    """
    probabilities = route(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))
    kept, chosen = jax.lax.top_k(probabilities, active)
    if renormalised:
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(chosen, logits.shape[-1], dtype=kept.dtype)
    return jnp.einsum("blk,blke->ble", kept, one_hot)


def numbered(parameters: Mapping[str, Any], projection: str) -> list[Any]:
    """The `{"weight", "bias"?}` of one projection of all experts, whose numbers are the keys of `parameters`."""
    return [parameters[str(number)][projection] for number in range(len(parameters))]


def affine_each(
    entries: Sequence[Any], x: Float[Array, "..."], routed: Bool[Array, "batch length experts"]
) -> Float[Array, "experts batch length out"]:
    """`x Wᵀ + b` of every expert, as `qjax.models.linear.affine`.

    `x` is `[batch, length, in]` for all, or `[experts, batch, length, in]`. What a record sees of an expert's input
    are its tokens, `routed`; the others are zeros.
    """
    weights = [entry["weight"] for entry in entries]
    y = answered(weights, x, routed)
    y = _products(weights, x, routed) if y is None else y
    for key in ("bias", "probe"):
        if key in entries[0]:
            added = jnp.stack([entry[key] for entry in entries]).astype(y.dtype)
            y = y + (added[:, None, None, :] if key == "bias" else added)
    return y


def mixed(
    y: Float[Array, "experts batch length out"], weights: Float[Array, "batch length experts"]
) -> Float[Array, "batch length out"]:
    """The sum of all experts' outputs by their weights; what has the weight 0 does not count, whatever it is."""
    weights = jnp.moveaxis(weights, 2, 0)[..., None]
    return jnp.sum(jnp.where(weights > 0, y * weights.astype(y.dtype), 0), axis=0)


def _products(weights: Sequence[Any], x: Array, routed: Array) -> Array:
    """`x Wᵀ` of every weight: arrays in one product, operators of one kind in one loop, others one by one."""
    own = x.ndim == 4
    if not any(isinstance(weight, Operator) for weight in weights):
        return jax.vmap(product, in_axes=(0 if own else None, 0))(x, jnp.stack([jnp.asarray(w) for w in weights]))
    of = lambda number: x[number] if own else x  # noqa: E731
    if len({_kind(weight) for weight in weights}) > 1:
        return jnp.stack([product(of(number), weight) for number, weight in enumerate(weights)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *weights)
    out = jax.eval_shape(product, of(0), weights[0])

    def one(number: Array) -> Array:
        """One expert's product; that of an expert without tokens is not computed."""
        weight = jax.tree.map(lambda leaf: leaf[number], stacked)
        needed = jnp.any(jnp.take(routed, number, axis=2))
        return jax.lax.cond(needed, lambda: product(of(number), weight), lambda: jnp.zeros(out.shape, out.dtype))

    return jax.lax.map(one, jnp.arange(len(weights), dtype=jnp.int32))


def _kind(weight: Any) -> Any:
    """What must be equal for matrices to be stacked: the structure, and shape and dtype of every leaf."""
    flat, structure = jax.tree.flatten(weight)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in flat)
