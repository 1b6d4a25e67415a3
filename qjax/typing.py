"""Types that all rooms share, and the decorator of their pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array

__all__ = ["HostOrDevice", "Leaf", "brief", "pytree", "static"]

T = TypeVar("T")

Leaf: TypeAlias = Any
"""An array, or whatever jax puts in its place in a pytree: a shape, a sharding, a batch of arrays."""

HostOrDevice: TypeAlias = Array | np.ndarray
"""Host arrays go into compiled programs as they are: converting them first would compile a program of its own."""


def static(**options: Any) -> Any:
    """A field of a pytree that is no leaf but part of its structure; it is hashable.

    So it is for flax too, where a class of one's own under `flax.struct.dataclass` inherits it.
    """
    return dataclasses.field(metadata={"static": True, "pytree_node": False}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass that jax knows as a pytree, whose leaves are all fields that are not `static`.

    An instance has `replace(**changes)`, a copy with other values, as `dataclasses.replace` makes it, and is printed in
    a line: of arrays the dtype and shape.
    """
    if "__repr__" not in vars(cls):
        cls.__repr__ = _short  # before the dataclass makes its own
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    meta = [field.name for field in fields if field.metadata.get("static", False)]
    made.replace = dataclasses.replace
    return jax.tree_util.register_dataclass(made, [field.name for field in fields if field.name not in meta], meta)


def _short(self: Any) -> str:
    parts = (f"{field.name}={brief(getattr(self, field.name))}" for field in dataclasses.fields(self))
    return f"{type(self).__name__}({', '.join(parts)})"


def brief(value: Any) -> str:
    """A value for people: `float32[64, 64]` of an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)
