"""Random keys by name, so that no result depends on the order in which layers are visited."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import InputError

__all__ = ["name_id", "named_key", "root_key", "seed_of"]


def root_key(seed: int) -> jax.Array:
    """The key whose two words are a seed of 64 bits: `jax.random.key(seed)` for 32, without compiling a program."""
    return jax.random.wrap_key_data(jax.device_put(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)))


def seed_of(key: Any) -> int:
    """The seed, below 2^64, whose `root_key` is `key`: a whole number as it is, or the words of a jax key.

    Raises InputError for anything else: negative numbers, several keys, keys of another generator than Threefry.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < 2**32:
            raise InputError(f"key is {key}; a seed lies in 0 … 2^32 − 1, or give jax.random.key(seed)")
        return int(key)
    words = None
    if isinstance(key, jax.Array):
        words = np.asarray(jax.random.key_data(key) if _is_key(key) else key)
    if words is None or words.shape != (2,) or words.dtype != np.uint32:
        what = f"an array {key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
        raise InputError(f"key is {what}; it is a seed such as 0, or one key, jax.random.key(seed)")
    return int(words[0]) << 32 | int(words[1])


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def name_id(name: str) -> int:
    """A stable 32-bit integer of a layer's name (the first four bytes of its SHA-256, little-endian)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def named_key(root: jax.Array, name: str) -> jax.Array:
    """`fold_in(root, name_id(name))`: the key of one layer, from the run's root key."""
    return jax.random.fold_in(root, name_id(name))
