"""A table whose rows are looked up in another dtype than float32: a quantised embedding of a model in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.errors import InputError
from qjax.matrix.operator import OPERATORS, checked_format, checked_shape, make, part
from qjax.typing import HostOrDevice, Leaf, pytree, static

__all__ = ["Lookup"]

_FORMAT = 1
_DTYPES = ("bfloat16", "float16")


@pytree
class Lookup:
    """The matrix `table`, whose rows come in `dtype`, so that the activations of its model have it.

    Attributes:
      table: an operator with `rows`.
      dtype: "bfloat16" or "float16", static.
    """

    table: Leaf
    dtype: str = static()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.table.shape

    @property
    def stored_bits(self) -> int:
        """Bits of the table."""
        return self.table.stored_bits

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the table."""
        return self.table.bits_per_weight

    def dequantize(self) -> Float[Array, "out in"]:
        """The table, float32."""
        return self.table.dequantize()

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x."""
        return self.table.matmul(x)

    def rows(self, index: Int[HostOrDevice, "*batch"]) -> Float[Array, "*batch in"]:
        """Rows of the table, rounded to the dtype."""
        return self.table.rows(index).astype(jnp.dtype(self.dtype))

    def spec(self) -> dict[str, Any]:
        """The dtype and the spec of the table."""
        return {
            "kind": "lookup",
            "format": _FORMAT,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "table": self.table.spec(),
        }


@OPERATORS.register("lookup")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> Lookup:
    checked_format(spec, _FORMAT)
    shape, dtype = checked_shape(spec["shape"]), spec["dtype"]
    if dtype not in _DTYPES:
        raise InputError(f"the rows of a lookup are {dtype!r}; they are one of {', '.join(_DTYPES)}")
    table = make(spec["table"], part(arrays, "table"))
    if tuple(table.shape) != shape or not hasattr(table, "rows"):
        kind = spec["table"]["kind"]
        raise InputError(f"a lookup of shape {list(shape)} in an operator {kind!r} of {list(table.shape)}")
    return Lookup(table, dtype)
