"""`y = x Wᵀ`: the single place where a dense weight and a quantised one are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.typing import HostOrDevice

__all__ = ["Operator", "linear", "linear_weight", "replace_linears", "summed"]


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
    if x.dtype == jnp.bfloat16:
        return _bfloat16(x, weight.astype(x.dtype))
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


@jax.custom_vjp
def _bfloat16(x: Array, weight: Array) -> Array:
    """`x Wᵀ`, added up in float32, in both directions.

    The derivative that JAX makes of such a product multiplies float32 by bfloat16, which a CPU does at half the speed.
    """
    return summed("...i,oi->...o", x, weight)


def summed(subscripts: str, a: Array, b: Array) -> Array:
    """A product that adds up in float32, rounded once to the dtype of a."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16(x, weight), (x, weight)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    return summed("...o,oi->...i", gradient, weight), summed("...o,...i->oi", gradient, x)


_bfloat16.defvjp(_forward, _backward)


def linear_weight(parameters: Any, linear: str) -> Any:
    """The weight of one linear of a block."""
    group, leaf = linear.split(".")
    return parameters[group][leaf]["weight"]


def replace_linears(parameters: Any, matrices: Mapping[str, Any]) -> Any:
    """A block's parameters with the weights of some linears replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    for linear, matrix in matrices.items():
        group, leaf = linear.split(".")
        result[group][leaf] = {**result[group][leaf], "weight": matrix}
    return result
