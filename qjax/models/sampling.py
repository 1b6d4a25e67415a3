"""Choice of the next token from logits: greedy, temperature, the k likeliest, the likeliest of total probability p."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.models.transformer import logits
from qjax.typing import HostOrDevice

__all__ = ["Sampling", "choose", "next_token"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The choice of a token; static under `jit`.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens (None: all).
      top_p: then keep the likeliest tokens up to and including the one that reaches probability p (1: all).
      seed: of the random numbers; sequence i of a batch has its own, independent of the others and of the batch.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise InputError(f"temperature is {self.temperature}; 0 (greedy) or 1e-6 to 1e6 is expected")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise InputError(f"top_k is {self.top_k}; a whole number of at least 1 is expected, or null")
        if not _number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; a probability above 0 and at most 1 is expected")
        if not _whole(self.seed) or not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; a whole number in 0 … 2^32 − 1 is expected")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or isinstance(value, float)


def choose(scores: Float[Array, " vocab"], key: Array, sampling: Sampling) -> Int[Array, ""]:
    """One token of the logits. Equal logits: the lowest id is the likelier."""
    if sampling.temperature == 0:
        return jnp.argmax(scores).astype(jnp.int32)
    scores = scores / jnp.float32(sampling.temperature)
    if sampling.top_k is not None or sampling.top_p < 1:
        order = jnp.argsort(-scores, stable=True)
        ranked = jnp.take(scores, order)
        if sampling.top_k is not None:
            ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, -jnp.inf)
        if sampling.top_p < 1:
            probability = jax.nn.softmax(ranked)
            before = jnp.cumsum(probability) - probability
            ranked = jnp.where(
                (before < jnp.float32(sampling.top_p)) | (jnp.arange(ranked.size) == 0), ranked, -jnp.inf
            )
        return jnp.take(order, jax.random.categorical(key, ranked)).astype(jnp.int32)
    return jax.random.categorical(key, scores).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def next_token(
    parameters: dict[str, Any],
    x: Float[HostOrDevice, "batch length width"],
    last: Int[HostOrDevice, " batch"],
    number: Int[HostOrDevice, ""],
    config: ModelConfig,
    sampling: Sampling,
) -> Int[Array, " batch"]:
    """The token after position `last` of every sequence; `number` counts the tokens drawn before."""
    own = jnp.take_along_axis(x, jnp.asarray(last)[:, None, None], axis=1, mode="clip")
    scores = logits(parameters, own, config)[:, 0]
    root = jax.random.key(sampling.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(root, i), number))(jnp.arange(x.shape[0]))
    return jax.vmap(lambda s, k: choose(s, k, sampling))(scores, keys)
