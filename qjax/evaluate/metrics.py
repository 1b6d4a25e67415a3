"""Per-token comparison of a model with its reference, one compiled program, bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from qjax.models import transformer
from qjax.models.config import ModelConfig

__all__ = ["chunked", "divergence", "predicting", "token_metrics", "token_nll"]

# Logits of one chunk of positions; about five arrays of this size live at once.
CHUNK_BYTES = 32 * 2**20
# Below this |log(q/p)| the direct form of the divergence loses digits and the series takes over.
SERIES_BELOW = 0.25


def divergence(log_p: Float[Array, "*batch vocab"], log_q: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """`KL(p ‖ q) = Σ p log(p/q)` in nats, from normalised log probabilities.

    Summed as `Σ (q - p - p·d)`, `d = log q - log p`, whose terms are never negative (the added `Σ q - p` is zero), so
    nothing cancels between tokens. For small `d` a term is `p (eᵈ - 1 - d)` by its series up to `d⁶`.
    """
    p, d = jnp.exp(log_p), log_q - log_p
    tail = 1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6)))
    terms = jnp.where(jnp.abs(d) < SERIES_BELOW, 0.5 * p * jnp.square(d) * tail, jnp.exp(log_q) - p - p * d)
    return jnp.sum(terms, axis=-1)


def chunked(function: Callable[..., Any], arrays: tuple[Array, ...], vocab_size: int) -> Any:
    """`function` over chunks `[1, chunk, …]` of the leading positions of `arrays`, padded, one chunk at a time."""
    count = arrays[0].shape[0]
    chunk = min(count, max(1, CHUNK_BYTES // (4 * vocab_size)))
    chunks = -(-count // chunk)
    padding = chunks * chunk - count

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(chunks, 1, chunk, *x.shape[1:])

    results = jax.lax.map(lambda parts: function(*parts), tuple(split(x) for x in arrays))
    return jax.tree.map(lambda x: x.reshape(chunks * chunk)[:count], results)


def predicting(hidden: Float[Array, "batch length width"]) -> Float[Array, "positions width"]:
    """The hidden states that predict a next token of the window, float32, one row per position."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]).astype(jnp.float32)


def shared_out(function: Callable[..., Any], mesh: Mesh | None, heads: int) -> Callable[..., Any]:
    """`function(*heads, *batches)` with every batch split over the mesh axis "data"; itself without a mesh.

    The axis "model" stays the compiler's: heads that are cut along the vocabulary stay so.
    """
    if mesh is None:
        return function

    def mapped(*arrays: Any) -> Any:
        specs = tuple(P() if i < heads else P("data") for i in range(len(arrays)))
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P("data"), axis_names={"data"}, check_vma=False
        )(*arrays)

    return mapped


def _nll(log_p: Array, targets: Array) -> Array:
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def token_metrics(
    reference_head: dict[str, Any],
    head: dict[str, Any],
    reference_hidden: Float[Array, "batch length width"],
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length-1"],
    config: ModelConfig,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, "batch length-1"] | Bool[Array, "batch length-1"]]:
    """Losses of the reference p and the model q, and their divergence, for every next token of every window.

    Position t reads tokens 0…t and predicts `targets[t]` (token t+1). Per position: `nll_reference = -log p(target)`,
    `nll = -log q(target)` and `kl = KL(p ‖ q)` in nats, `agree = (argmax p = argmax q)`. Softmax in float32.

    Args:
      reference_head: parameters of the last step of p, as returned by `transformer.head`.
      head: likewise, of q.
      reference_hidden: states of p after the last block, before the final norm.
      hidden: likewise, of q.
      targets: ids of the next tokens.
      config: of the model.
      mesh: where the heads lie, if on a mesh; batches are split over its axis "data".

    A non-finite logit shows as a non-finite `nll` or `kl` of its position. Logits exist for one chunk of positions at a
    time. Source: KL to the original as in YAQA (arXiv:2505.22988), mean over all positions.
    """

    def chunk(reference_head: Any, head: Any, reference: Array, own: Array, target: Array) -> dict[str, Array]:
        log_p = jax.nn.log_softmax(transformer.logits(reference_head, reference, config), axis=-1)
        log_q = jax.nn.log_softmax(transformer.logits(head, own, config), axis=-1)
        return {
            "nll_reference": _nll(log_p, target),
            "nll": _nll(log_q, target),
            "kl": divergence(log_p, log_q),
            "agree": jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1),
        }

    def whole(reference_head: Any, head: Any, reference: Array, own: Array, targets: Array) -> dict[str, Array]:
        arrays = (predicting(reference), predicting(own), targets.reshape(-1))
        flat = chunked(functools.partial(chunk, reference_head, head), arrays, config.vocab_size)
        return {name: values.reshape(targets.shape) for name, values in flat.items()}

    return shared_out(whole, mesh, 2)(reference_head, head, reference_hidden, hidden, targets)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def token_nll(
    head: dict[str, Any],
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length-1"],
    config: ModelConfig,
    mesh: Mesh | None = None,
) -> Float[Array, "batch length-1"]:
    """`-log q(target)` in nats of every next token, as in `token_metrics`, for one model alone."""

    def chunk(head: Any, own: Array, target: Array) -> Array:
        return _nll(jax.nn.log_softmax(transformer.logits(head, own, config), axis=-1), target)

    def whole(head: Any, own: Array, targets: Array) -> Array:
        arrays = (predicting(own), targets.reshape(-1))
        return chunked(functools.partial(chunk, head), arrays, config.vocab_size).reshape(targets.shape)

    return shared_out(whole, mesh, 1)(head, hidden, targets)
