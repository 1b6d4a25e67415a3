"""Several operators in the place of one parameter whose slices are linears of their own."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax.function import views
from qjax.typing import Leaf, pytree, static

__all__ = ["Pieces"]


@pytree
class Pieces:
    """A parameter as the operators of its slices, which cover it.

    Attributes:
      operators: by the name of the linear.
      views: from the leaf to every operator's matrices, in the order of the names.
      leaf_shape: the parameter's.
    """

    operators: dict[str, Leaf]
    views: tuple[Any, ...] = static()
    leaf_shape: tuple[int, ...] = static()

    @property
    def stored_bits(self) -> int:
        """Bits of all operators."""
        return sum(own.stored_bits for own in self.operators.values())

    def dense(self, dtype: Any) -> jax.Array:
        """The whole parameter."""
        leaf = jnp.zeros(math.prod(self.leaf_shape), dtype)
        for view, name in zip(self.views, sorted(self.operators), strict=True):
            where = views.places(view, self.leaf_shape).reshape(-1)
            leaf = leaf.at[where].set(self.operators[name].dequantize().reshape(-1).astype(dtype))
        return leaf.reshape(self.leaf_shape)
