"""Labels of the Fisher matrix, and the gradient of their cross-entropy in the last block's output."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from qjax.models.attention import capped
from qjax.models.config import ModelConfig
from qjax.models.linear import summed
from qjax.models.transformer import final
from qjax.typing import HostOrDevice

__all__ = ["draw", "label_gradient"]

_GROUP = 128
_POSITIONS = 512  # whose logits are held at once ...
_PIECES = 8  # ... or more, for a program of at most so many pieces: a loop's products are slower on a CPU


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
    with the key of the data `key` folded with s), or are the next tokens (then the last position has none). With x in
    bfloat16 both products take their operands in it and add up in float32; the logits are not rounded. A few sequences
    at a time, so that few logits are held.
    """
    x, weight = jnp.asarray(x), jnp.asarray(parameters["head"]).astype(x.dtype)
    hidden, pull = jax.vjp(lambda x: final(parameters, x, config), x)
    root, length = jax.random.wrap_key_data(jnp.asarray(key)), x.shape[1]

    def sequences(hidden: Array, tokens: Array, numbers: Array) -> Array:
        raw = jnp.einsum("btn,vn->btv", hidden, weight, preferred_element_type=jnp.float32)
        z = capped(raw, config.logits_cap)
        gradient = jax.nn.softmax(z, axis=-1)
        if labels == "sampled":
            chosen = jax.vmap(lambda s, p: draw(jax.random.fold_in(root, s), p))(numbers, gradient)
            counted = jnp.ones(length, z.dtype)
        else:
            chosen = jnp.roll(tokens, -1, axis=1)
            counted = (jnp.arange(length) < length - 1).astype(z.dtype)
        hot = jnp.arange(z.shape[2]).reshape(1, 1, -1) == chosen[:, :, None]
        gradient = (gradient - hot.astype(z.dtype)) * counted.reshape(1, -1, 1)
        if config.logits_cap is not None:
            gradient = gradient * (1 - jnp.square(z / config.logits_cap))
        gradient = gradient.astype(x.dtype)
        return summed("btv,vn->btn", gradient, weight)

    batch = x.shape[0]
    at_once = max(1, _POSITIONS // length, -(-batch // _PIECES))
    arrays = hidden, jnp.asarray(tokens), jnp.asarray(numbers)
    pieces = [sequences(*(a[i : i + at_once] for a in arrays)) for i in range(0, batch, at_once)]
    return pull(jnp.concatenate(pieces))[0]
