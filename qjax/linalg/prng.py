"""Random keys by name, so that no result depends on the order in which layers are visited."""

from __future__ import annotations

import hashlib

import jax

__all__ = ["name_id", "named_key"]


def name_id(name: str) -> int:
    """A stable 32-bit integer of a layer's name (the first four bytes of its SHA-256, little-endian)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def named_key(root: jax.Array, name: str) -> jax.Array:
    """`fold_in(root, name_id(name))`: the key of one layer, from the run's root key."""
    return jax.random.fold_in(root, name_id(name))
