"""The context of a block's attention: whole sequences, or new positions that look back into a cache.

A block's forward pass is written once, against this interface: `context.rotary(q, k)` turns heads by their positions,
`context.attend(q, k, v)` mixes the values that every position sees. The cached step is the same block in another
context.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.attention import attend, capped
from qjax.models.config import AttentionKind, ModelConfig
from qjax.models.rope import rope_tables, rotate
from qjax.typing import HostOrDevice

__all__ = ["Cached", "Context"]


def _window(config: ModelConfig, kind: AttentionKind | None) -> int | None:
    return config.sliding_window if kind is None else kind.window


def _scale(config: ModelConfig, dim: int) -> float:
    return dim**-0.5 if config.attention_scale is None else config.attention_scale


Queries = Float[Array, "batch length heads dim"]
Keys = Float[Array, "batch length kv dim"]


@dataclasses.dataclass
class Context:
    """Whole sequences from position 0 on: causal attention, in a sliding window where the model has one.

    Attributes:
      config: the model's, or on a mesh that of this device's part.
      kind: of this layer's attention, where layers differ.
    """

    config: ModelConfig
    kind: AttentionKind | None = None

    def rotary(self, q: Queries, k: Keys) -> tuple[Queries, Keys]:
        """Queries and keys turned by their positions."""
        if self.kind is not None and not self.kind.rotary:
            return q, k
        cos, sin = rope_tables(q.shape[1], self.config, self.kind)
        return rotate(q, cos[None], sin[None]), rotate(k, cos[None], sin[None])

    def attend(self, q: Queries, k: Keys, v: Keys) -> Float[Array, "batch length features"]:
        """The mixed values of every query, its heads side by side; query heads share key and value heads in groups.

        One batched matrix product per step, [batch·kv heads, groups·length, dim]: XLA's CPU backend is three times
        slower on 5-D einsums.
        """
        batch, length, kv, dim = k.shape
        groups = q.shape[2] // kv
        q = q.reshape(batch, length, kv, groups, dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch * kv, groups * length, dim)
        k, v = (x.transpose(0, 2, 1, 3).reshape(batch * kv, length, dim) for x in (k, v))
        ahead = np.arange(length)[:, None] - np.arange(length)[None, :]  # query position minus key position
        visible = ahead >= 0
        if (window := _window(self.config, self.kind)) is not None:
            visible &= ahead < window
        mixed: Array = attend(
            q, k, v, np.tile(visible, (groups, 1)), _scale(self.config, dim), self.config.attention_cap
        )
        mixed = mixed.reshape(batch, kv, groups, length, dim).transpose(0, 3, 1, 2, 4)
        return mixed.reshape(batch, length, kv * groups * dim)


@dataclasses.dataclass
class Cached:
    """Further positions of every sequence, with the keys and values of one block before them in a cache.

    Attributes:
      config: as of `Context`.
      keys: `[batch, kv heads, slots, dim]`, with the new positions' after `attend`.
      values: likewise.
      start: `[batch]` the slot of every sequence's first new position.
      kind: as of `Context`.
    """

    config: ModelConfig
    keys: Float[Array, "batch kv slots dim"]
    values: Float[Array, "batch kv slots dim"]
    start: Int[HostOrDevice, " batch"]
    kind: AttentionKind | None = None

    def _positions(self, length: int) -> Int[Array, "batch length"]:
        return jnp.asarray(self.start)[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]

    def rotary(self, q: Queries, k: Keys) -> tuple[Queries, Keys]:
        """Queries and keys turned by their positions; scalings by length take the slots for it."""
        if self.kind is not None and not self.kind.rotary:
            return q, k
        position, slots = self._positions(q.shape[1]), self.keys.shape[2]
        tables = rope_tables(slots, self.config, self.kind)
        cos, sin = (jnp.take(jnp.asarray(table), position, axis=0, mode="clip") for table in tables)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def attend(self, q: Queries, k: Keys, v: Keys) -> Float[Array, "batch length features"]:
        """As `Context.attend`, of the new positions to all slots up to them; their keys and values enter the cache."""
        batch, length, kv, dim = k.shape
        slots, groups, dtype = self.keys.shape[2], q.shape[2] // kv, q.dtype
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
        self.keys = write(self.keys, k.transpose(0, 2, 1, 3).astype(self.keys.dtype), self.start)
        self.values = write(self.values, v.transpose(0, 2, 1, 3).astype(self.values.dtype), self.start)
        q = q.reshape(batch, length, kv, groups, dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(batch, kv, groups * length, dim).astype(self.keys.dtype)
        scores = jnp.einsum("bkqd,bksd->bkqs", q, self.keys, preferred_element_type=jnp.float32)
        scores = capped(scores * _scale(self.config, dim), self.config.attention_cap)
        behind = self._positions(length)[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
        visible = behind >= 0
        if (window := _window(self.config, self.kind)) is not None:
            visible &= behind < window
        visible = jnp.tile(visible[:, None], (1, 1, groups, 1))
        weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
        mixed = jnp.einsum("bkqs,bksd->bkqd", weights.astype(self.values.dtype), self.values)
        mixed = mixed.reshape(batch, kv, groups, length, dim).transpose(0, 3, 1, 2, 4)
        return mixed.reshape(batch, length, kv * groups * dim).astype(dtype)
