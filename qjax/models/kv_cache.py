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
from qjax.models.context import Cached
from qjax.models.families import KIND, family
from qjax.models.on_mesh import CACHE, HIDDEN, ROWS, OverMesh, spread
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


def _block(
    parameters: Any, config: ModelConfig, x: Array, keys: Array, values: Array, start: Array
) -> tuple[Array, Array, Array]:
    context = Cached(config, keys, values, start, parameters.get(KIND))
    y = family(config).block(parameters, x, context)
    return y, context.keys, context.values


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
