"""A stack of operators of one kind and setting: layers that one program scans over, or the experts of a block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.matrix.operator import OPERATORS, LinearOperator, checked_format, codebooks_of, leaves, make, part
from qjax.typing import Leaf, pytree, static

__all__ = ["Stacked", "stack"]

_FORMAT = 1


@pytree
class Stacked:
    """`W [*axes, out, in]`: operators of one structure, whose arrays have the stack's axes in front.

    Attributes:
      stacked: the arrays of all entries by path, `[*axes, …]`.
      shared: tables of codebooks by path, which are those of every entry.
      structure: of the operator of one entry.
      order: the paths of its leaves.
      axes: the stack's shape.
      matrix: (out, in) of every entry.
    """

    stacked: dict[str, Leaf]
    shared: dict[str, Leaf]
    structure: Any = static()
    order: tuple[str, ...] = static()
    axes: tuple[int, ...] = static()
    matrix: tuple[int, int] = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """(*axes, out, in)."""
        return (*self.axes, *self.matrix)

    @property
    def stored_bits(self) -> int:
        """Bits of all entries."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in self.stacked.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all entries together."""
        return self.stored_bits / math.prod(self.shape)

    def entry(self, arrays: Mapping[str, Any]) -> Any:
        """The operator of one entry, of its own arrays by path."""
        return jax.tree.unflatten(self.structure, [{**arrays, **self.shared}[name] for name in self.order])

    def taken_apart(self) -> tuple[Any, Callable[[Any], Any]]:
        """(arrays with the first axis in front, what makes an operator of an entry of them)."""
        rest = self.axes[1:]
        return self.stacked, lambda own: dataclasses.replace(self, stacked=own, axes=rest) if rest else self.entry(own)

    def unstacked(self) -> list[Any]:
        """The operators of all entries, in order."""
        count = len(self.axes)
        flat = {name: a.reshape(-1, *a.shape[count:]) for name, a in self.stacked.items()}
        return [self.entry({name: a[i] for name, a in flat.items()}) for i in range(math.prod(self.axes))]

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        for _ in self.axes:
            function = jax.vmap(function)
        return function

    def dequantize(self) -> Float[Array, "*axes out in"]:
        """All matrices, float32."""
        return self._mapped(lambda own: self.entry(own).dequantize())(self.stacked)

    def matmul(self, x: Float[Array, "*axes rows in"]) -> Float[Array, "*axes rows out"]:
        """`x Wᵀ` of every entry with its own rows, in the dtype of x."""
        return self._mapped(lambda own, x: self.entry(own).matmul(x))(self.stacked, x)

    def spec(self) -> dict[str, Any]:
        """The stack's axes and the spec of one entry."""
        first = self.entry({name: a[(0,) * len(self.axes)] for name, a in self.stacked.items()})
        return {"kind": "stacked", "format": _FORMAT, "axes": list(self.axes), "each": first.spec()}


def stack(operators: Sequence[Any], axes: tuple[int, ...]) -> Stacked:
    """The stack of as many operators as `axes` has entries.

    A column order that only some have is the identity of the others. Raises InputError for operators of different
    structures.
    """
    orders = [getattr(own, "permutation", None) for own in operators]
    found = next((order for order in orders if order is not None), None)
    if found is not None:
        same = jnp.arange(found.shape[0], dtype=found.dtype)
        operators = [
            dataclasses.replace(own, permutation=same) if order is None else own
            for own, order in zip(operators, orders, strict=True)
        ]
    structures = {jax.tree.structure(own) for own in operators}
    specs = {repr(own.spec()) for own in operators}
    if len(structures) > 1 or len(specs) > 1:
        raise InputError(
            f"the {len(operators)} matrices of a stack have {max(len(specs), len(structures))} different settings; one "
            "program needs equal ones: give rules that match all of them or none"
        )
    first: LinearOperator = operators[0]
    tables = {f"{place}.{name}" for place, book in codebooks_of(first).items() for name in leaves(book)}
    arrays = [leaves(own) for own in operators]
    stacked = {
        name: jnp.stack([own[name] for own in arrays]).reshape(*axes, *leaf.shape)
        for name, leaf in arrays[0].items()
        if name not in tables
    }
    shared = {name: arrays[0][name] for name in arrays[0] if name in tables}
    (structure,) = structures
    return Stacked(stacked, shared, structure, tuple(arrays[0]), axes, first.shape)


@OPERATORS.register("stacked")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> Stacked:
    checked_format(spec, _FORMAT)
    axes = spec["axes"]
    if not isinstance(axes, list) or not axes or not all(type(size) is int and size > 0 for size in axes):
        raise InputError(f"the axes of a stack are {axes!r}; they are positive whole numbers")
    own, shared, count = part(arrays, "stacked"), part(arrays, "shared"), math.prod(axes)
    for name, array in own.items():
        if list(array.shape[: len(axes)]) != axes:
            raise InputError(f"{name} is {array.dtype}{list(array.shape)} in a stack of {axes}")
    flat = {name: np.asarray(array).reshape(count, *array.shape[len(axes) :]) for name, array in own.items()}
    entries = [
        make(spec["each"], {**{name: jnp.asarray(array[i]) for name, array in flat.items()}, **shared})
        for i in range(count)
    ]
    return stack(entries, tuple(axes))
