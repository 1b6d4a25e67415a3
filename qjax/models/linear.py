"""`y = x Wᵀ`: the single place where a dense weight and a quantised one are told apart."""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.quantized import QuantizedMatrix

__all__ = ["HostOrDevice", "linear"]

HostOrDevice: TypeAlias = Array | np.ndarray
"""Host arrays go into compiled programs as they are: converting them first would compile a program of its own."""


def linear(
    x: Float[Array, "*batch in"], weight: Float[HostOrDevice, "out in"] | QuantizedMatrix
) -> Float[Array, "*batch out"]:
    """`x Wᵀ` in the dtype of `x` (a quantised weight is decoded on the fly and stays packed in memory)."""
    if isinstance(weight, QuantizedMatrix):
        return weight.matmul(x)
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
