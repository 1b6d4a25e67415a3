"""`y = x Wᵀ`: the single place where a dense weight and a quantised one are told apart."""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["HostOrDevice", "Operator", "linear"]

HostOrDevice: TypeAlias = Array | np.ndarray
"""Host arrays go into compiled programs as they are: converting them first would compile a program of its own."""


@runtime_checkable
class Operator(Protocol):
    """A matrix that is not a plain array: `QuantizedMatrix`, or what fine-tuning puts in its place."""

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of `x`."""
        ...


def linear(
    x: Float[Array, "*batch in"], weight: Float[HostOrDevice, "out in"] | Operator
) -> Float[Array, "*batch out"]:
    """`x Wᵀ` in the dtype of `x` (a quantised weight is decoded on the fly and stays packed in memory)."""
    if isinstance(weight, Operator):
        return weight.matmul(x)
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
