"""The contract of what can stand in a linear's place, and the table of its kinds.

An operator is stored as its `spec()`, JSON values, and its arrays, the leaves of its pytree by path (`scaling.unit`,
`terms.1.a`). Whoever writes one needs nothing else; whoever reads one asks `OPERATORS` for the reader of its kind.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.errors import InputError
from qjax.registry import Registry
from qjax.typing import Leaf

__all__ = [
    "OPERATORS",
    "LinearOperator",
    "checked_array",
    "checked_format",
    "checked_shape",
    "codebooks_of",
    "is_operator",
    "leaves",
    "make",
    "operators",
    "part",
    "place_name",
]


@runtime_checkable
class LinearOperator(Protocol):
    """A matrix W `[out, in]` that is not a plain array, as a pytree.

    Attributes:
      shape: (out, in).
      bits_per_weight: `stored_bits` per weight.
      stored_bits: bits of all stored arrays but tables that a whole model shares.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def bits_per_weight(self) -> float: ...
    @property
    def stored_bits(self) -> int: ...

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x."""
        ...

    def dequantize(self) -> Float[Array, "out in"]:
        """W, float32."""
        ...

    def spec(self) -> dict[str, Any]:
        """The static part as JSON values: `kind`, the name in `OPERATORS`, `format`, its version, and the rest."""
        ...


OPERATORS: Registry[LinearOperator] = Registry("operator", "qjax.matrix.OPERATORS")
"""Readers by kind: `reader(spec, arrays)` is the operator whose `spec()` and leaves by path these are.

A reader raises InputError (or KeyError, TypeError, ValueError) for what does not fit; it must not trust any size.
"""


def is_operator(node: Any) -> TypeGuard[LinearOperator]:
    """Whether a node of a pytree is an operator, whatever its leaves are."""
    return all(callable(getattr(type(node), name, None)) for name in ("matmul", "dequantize", "spec"))


def make(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> LinearOperator:
    """The operator of a `spec()` and its arrays by path. Raises InputError as its kind's reader does."""
    return OPERATORS.make(spec["kind"], spec, arrays)


def place_name(path: Sequence[Any], separator: str = ".") -> str:
    """The path of a leaf of a pytree in one string: `terms.1.a`."""
    return separator.join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def leaves(operator: Any) -> dict[str, Leaf]:
    """The leaves of a pytree by path."""
    return {place_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(operator)[0]}


def operators(tree: Any) -> dict[str, LinearOperator]:
    """The operators in a pytree by their path: `mlp.up_proj.weight` in a block."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_operator)
    return {place_name(path): leaf for path, leaf in flat if is_operator(leaf)}


def _is_codebook(node: Any) -> TypeGuard[Codebook]:
    return _codes(type(node)) and isinstance(node, Codebook)


@functools.cache
def _codes(kind: type) -> bool:
    """Whether a type has a codebook's methods; asked first: `isinstance` of a protocol takes 20 µs on Python 3.11."""
    return all(callable(getattr(kind, name, None)) for name in ("quantize", "dequantize", "pack", "unpack"))


def codebooks_of(operator: Any) -> dict[str, Codebook]:
    """The codebooks inside an operator by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(operator, is_leaf=_is_codebook)
    return {place_name(path): node for path, node in flat if _is_codebook(node)}


def part(arrays: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf]:
    """The arrays of `prefix.…`, named from there on."""
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}


def checked_format(spec: Mapping[str, Any], format: int) -> None:
    """Raises InputError for a spec of another format version than `format`, the newest that its reader knows."""
    if spec["format"] != format:
        raise InputError(f"operator {spec['kind']!r} has format version {spec['format']!r}; {format} can be read")


def checked_shape(value: Any, what: str = "the shape") -> tuple[int, int]:
    """(rows, columns) of a spec. Raises InputError unless they are two positive whole numbers."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise InputError(f"{what} is {value!r}; it is two positive whole numbers")
    return value[0], value[1]


def checked_array(
    arrays: Mapping[str, Leaf], name: str, shape: Sequence[int | None], kind: type[np.generic] = np.floating
) -> Leaf:
    """The array `name`, None when there is none of it.

    Raises InputError unless it has this shape (None stands for any size) and a dtype of this kind.
    """
    array = arrays.get(name)
    if array is None:
        return None
    fits = len(array.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )
    if not fits or not jnp.issubdtype(array.dtype, kind):
        allowed = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} is {array.dtype}{list(array.shape)}; it is {kind.__name__}[{allowed}]")
    return array
