"""A product of two thin matrices: what LoRA adds to a frozen matrix, or a compression of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.matrix.operator import OPERATORS, checked_array, checked_format, checked_shape
from qjax.typing import Leaf, pytree, static

__all__ = ["LowRank"]

_FORMAT = 1


@pytree
class LowRank:
    """`scale · B A`, of rank r at most.

    Attributes:
      b: B `[out, r]`.
      a: A `[r, in]`.
      scale: a factor, static (LoRA's α/r).
    """

    b: Leaf
    a: Leaf
    scale: float = static(default=1.0)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def stored_bits(self) -> int:
        """Bits of both factors."""
        return sum(8 * factor.size * factor.dtype.itemsize for factor in (self.b, self.a))

    @property
    def bits_per_weight(self) -> float:
        """`stored_bits` per weight of the product."""
        return self.stored_bits / math.prod(self.shape)

    def dequantize(self) -> Float[Array, "out in"]:
        """`scale · B A`, float32."""
        b, a = self.b.astype(jnp.float32), self.a.astype(jnp.float32)
        return self.scale * jnp.matmul(b, a, precision="highest")

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`scale · (x Aᵀ) Bᵀ` in the dtype of x."""
        low = jnp.einsum("...i,ri->...r", x, self.a.astype(x.dtype))
        return self.scale * jnp.einsum("...r,or->...o", low, self.b.astype(x.dtype))

    def spec(self) -> dict[str, Any]:
        """Shape, rank and scale."""
        rank = self.a.shape[0]
        return {"kind": "low_rank", "format": _FORMAT, "shape": list(self.shape), "rank": rank, "scale": self.scale}


@OPERATORS.register("low_rank")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> LowRank:
    checked_format(spec, _FORMAT)
    (out, inner), (rank, _) = checked_shape(spec["shape"]), checked_shape([spec["rank"], 1], "the rank")
    b, a = checked_array(arrays, "b", (out, rank)), checked_array(arrays, "a", (rank, inner))
    if a is None or b is None:
        raise InputError("a low-rank operator without both its factors")
    scale = spec["scale"]
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise InputError(f"the scale of a low-rank operator is {scale!r}; it is a finite number")
    return LowRank(b, a, float(scale))
