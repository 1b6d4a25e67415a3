"""A dense matrix as an operator: what a term of a sum is when nothing compresses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.matrix.operator import OPERATORS, checked_array, checked_format, checked_shape
from qjax.typing import Leaf, pytree

__all__ = ["Dense"]

_FORMAT = 1


@pytree
class Dense:
    """W itself.

    Attributes:
      weight: `[out, in]`, of any floating dtype.
    """

    weight: Leaf

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    @property
    def stored_bits(self) -> int:
        """Bits of the array."""
        return 8 * self.weight.size * self.weight.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits of the array's dtype."""
        return float(8 * self.weight.dtype.itemsize)

    def dequantize(self) -> Float[Array, "out in"]:
        """W, float32."""
        return self.weight.astype(jnp.float32)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x."""
        return jnp.einsum("...i,oi->...o", x, self.weight.astype(x.dtype))

    def spec(self) -> dict[str, Any]:
        """Its shape."""
        return {"kind": "dense", "format": _FORMAT, "shape": list(self.shape)}


@OPERATORS.register("dense")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> Dense:
    checked_format(spec, _FORMAT)
    weight = checked_array(arrays, "weight", checked_shape(spec["shape"]))
    if weight is None:
        raise InputError("a dense operator without its weight")
    return Dense(weight)
