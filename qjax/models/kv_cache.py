"""A transformer block that keeps its keys and values: every position is computed once, not again for every new one.

A cache has `slots` positions for every sequence of a batch. Sequences begin in slot 0, and may have different lengths:
what a shorter one's padding left behind lies after its own end, where nothing looks before it is overwritten.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.config import ModelConfig
from qjax.models.on_mesh import CACHE, HIDDEN, ROWS, OverMesh, spread
from qjax.models.transformer import apply, rms_norm, rope_tables, rotate
from qjax.typing import HostOrDevice

__all__ = ["Cache", "block_step", "empty_cache", "step"]

Cache = tuple[tuple[Array, Array], ...]
"""Keys and values of every block, `[batch, kv heads, slots, head dim]`."""


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype: Any = np.float32, blocks: Sequence[Any] = ()
) -> Cache:
    """Zeros; `2 · layers · batch · kv heads · slots · head dim` numbers, where `blocks` lie if these lie on a mesh."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    first = blocks[0] if len(blocks) else None
    where = first.sharding(CACHE) if isinstance(first, OverMesh) else None

    def make() -> Array:
        zeros = np.zeros(shape, dtype)
        if where is None or where.is_fully_addressable:
            return jax.device_put(zeros, where)
        return jax.make_array_from_callback(shape, where, lambda index: zeros[index])

    return tuple((make(), make()) for _ in range(config.num_layers))


def _attention(
    parameters: Any, x: Array, keys: Array, values: Array, start: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    batch, length, _ = x.shape
    slots, groups = keys.shape[2], config.num_heads // config.num_kv_heads

    def heads(name: str, count: int) -> Array:
        return apply(parameters[name], x).reshape(batch, length, count, config.head_dim)

    q, k = heads("q_proj", config.num_heads), heads("k_proj", config.num_kv_heads)
    v = heads("v_proj", config.num_kv_heads)
    if config.qk_norm:
        q = rms_norm(q, parameters["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, parameters["k_norm"], config.rms_norm_eps)
    position = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    cos, sin = (jnp.take(jnp.asarray(table), position, axis=0, mode="clip") for table in rope_tables(slots, config))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
    keys = write(keys, k.transpose(0, 2, 1, 3).astype(keys.dtype), start)
    values = write(values, v.transpose(0, 2, 1, 3).astype(values.dtype), start)
    q = q.reshape(batch, length, config.num_kv_heads, groups, config.head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, config.num_kv_heads, groups * length, config.head_dim).astype(keys.dtype)
    scores = jnp.einsum("bkqd,bksd->bkqs", q, keys, preferred_element_type=jnp.float32) * config.head_dim**-0.5
    behind = position[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    visible = behind >= 0
    if config.sliding_window is not None:
        visible &= behind < config.sliding_window
    visible = jnp.tile(visible[:, None], (1, 1, groups, 1))
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights, values)
    mixed = mixed.reshape(batch, config.num_kv_heads, groups, length, config.head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, config.num_heads * config.head_dim).astype(x.dtype), keys, values


def _block(
    parameters: Any, config: ModelConfig, x: Array, keys: Array, values: Array, start: Array
) -> tuple[Array, Array, Array]:
    normal = rms_norm(x, parameters["input_layernorm"], config.rms_norm_eps)
    mixed, keys, values = _attention(parameters["self_attn"], normal, keys, values, start, config)
    x = x + apply(parameters["self_attn"]["o_proj"], mixed)
    normal = rms_norm(x, parameters["post_attention_layernorm"], config.rms_norm_eps)
    mlp = parameters["mlp"]
    hidden = jax.nn.silu(apply(mlp["gate_proj"], normal)) * apply(mlp["up_proj"], normal)
    return x + apply(mlp["down_proj"], hidden), keys, values


def _anywhere(parameters: Any, config: ModelConfig, *arrays: Array) -> tuple[Array, Array, Array]:
    """`_block`, over a mesh where the parameters lie on one."""
    axes = (HIDDEN, CACHE, CACHE, ROWS)
    return spread(_block, parameters, config, arrays, axes, axes[:3])


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("keys", "values"))
def block_step(
    parameters: Any,
    x: Float[HostOrDevice, "batch length width"],
    keys: Float[Array, "batch kv slots dim"],
    values: Float[Array, "batch kv slots dim"],
    start: Int[HostOrDevice, " batch"],
    config: ModelConfig,
) -> tuple[Array, Array, Array]:
    """`length` further positions of every sequence, from slot `start` on: (outputs, keys, values).

    `start + length` must not exceed the slots. The caches given are used up.
    """
    return _anywhere(parameters, config, jnp.asarray(x), keys, values, jnp.asarray(start))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _whole_step(blocks: Any, x: Array, cache: Cache, start: Array, config: ModelConfig) -> tuple[Array, Cache]:
    new = []
    for parameters, (keys, values) in zip(blocks, cache, strict=True):
        x, keys, values = _anywhere(parameters, config, x, keys, values, start)
        new.append((keys, values))
    return x, tuple(new)


def step(
    blocks: Any,
    x: Float[HostOrDevice, "batch length width"],
    cache: Cache,
    start: Int[HostOrDevice, " batch"],
    config: ModelConfig,
    *,
    whole: bool = False,
) -> tuple[Array, Cache]:
    """All blocks, one program after the other (shared by blocks of equal shape), or as one `whole` program.

    One program needs no dispatches between blocks, and takes as many times longer to compile as there are blocks.
    """
    if whole:
        return _whole_step(blocks, x, cache, start, config)
    new = []
    for parameters, (keys, values) in zip(blocks, cache, strict=True):
        x, keys, values = block_step(parameters, x, keys, values, start, config)
        new.append((keys, values))
    return jnp.asarray(x), tuple(new)
