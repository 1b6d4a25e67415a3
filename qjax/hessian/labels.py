"""Labels of the Fisher matrix, and the gradient of their cross-entropy in the last block's output."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import logits

__all__ = ["draw", "label_gradient"]

_GROUP = 128


def draw(key: Array, probability: Float[Array, "positions vocab"]) -> Int[Array, " positions"]:
    """A token of every position's distribution, from two uniform numbers: a group of 128 tokens, then one of them.

    Inverts the cumulative sums of both. `jax.random.categorical` takes a random number for every token, which costs
    as much as the logits.
    """
    positions, vocab = probability.shape
    groups = -(-vocab // _GROUP)
    if vocab % _GROUP:
        probability = jnp.pad(probability, ((0, 0), (0, groups * _GROUP - vocab)))
    parts = probability.reshape(positions, groups, _GROUP)
    uniform = jax.random.uniform(key, (2, positions), probability.dtype)
    group = _invert(jnp.sum(parts, axis=2), uniform[0])
    own = jnp.take_along_axis(parts, group[:, None, None], axis=1, mode="clip")[:, 0]
    return jnp.minimum(group * _GROUP + _invert(own, uniform[1]), vocab - 1)


def _invert(weights: Float[Array, "positions n"], uniform: Float[Array, " positions"]) -> Int[Array, " positions"]:
    cumulative = jnp.cumsum(weights, axis=1)
    below = cumulative <= uniform[:, None] * cumulative[:, -1:]  # also skips what has no weight
    return jnp.minimum(jnp.sum(below, axis=1, dtype=jnp.int32), weights.shape[1] - 1)


@functools.partial(jax.jit, static_argnames=("config", "labels"))
def label_gradient(
    parameters: dict[str, HostOrDevice],
    x: Float[HostOrDevice, "batch length width"],
    tokens: Int[HostOrDevice, "batch length"],
    key: UInt[HostOrDevice, " 2"],
    numbers: UInt[HostOrDevice, " batch"],
    config: ModelConfig,
    *,
    labels: str,
) -> Float[Array, "batch length width"]:
    """`∂ℓ/∂x` of the cross-entropy, summed over positions, in the last block's output x.

    Labels are sampled from the softmax of the float32 logits at every position (of the sequence with number s among all
    with the key of the data `key` folded with s), or are the next tokens (then the last position has none).
    """
    z, pull = jax.vjp(lambda x: logits(parameters, x, config), jnp.asarray(x))
    gradient = jax.nn.softmax(z, axis=-1)
    if labels == "sampled":
        root = jax.random.wrap_key_data(jnp.asarray(key))
        chosen = jax.vmap(lambda s, p: draw(jax.random.fold_in(root, s), p))(jnp.asarray(numbers), gradient)
        weight = jnp.ones(z.shape[1], z.dtype)
    else:
        chosen = jnp.roll(jnp.asarray(tokens), -1, axis=1)
        weight = (jnp.arange(z.shape[1]) < z.shape[1] - 1).astype(z.dtype)
    hot = jnp.arange(z.shape[2]).reshape(1, 1, -1) == chosen[:, :, None]
    return pull((gradient - hot.astype(z.dtype)) * weight.reshape(1, -1, 1))[0]
