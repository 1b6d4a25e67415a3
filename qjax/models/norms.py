"""Normalisation of activations along their last axis, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.typing import HostOrDevice

__all__ = ["layer_norm", "rms_norm"]


def _along(x: HostOrDevice, vector: HostOrDevice) -> Array:
    """A vector in float32 with the rank of x."""
    return jnp.expand_dims(vector.astype(jnp.float32), tuple(range(x.ndim - 1)))


def rms_norm(x: HostOrDevice, gain: HostOrDevice, eps: float) -> Array:
    """`gain · x / √(mean x² + eps)` along the last axis, in float32; the dtype of x."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (jax.lax.rsqrt(mean_square + eps) * x32 * _along(x, gain)).astype(x.dtype)


def layer_norm(x: HostOrDevice, parameters: Any, eps: float) -> Array:
    """`gain · (x − mean x) / √(var x + eps) + bias` of `{"weight": gain, "bias"}`; the dtype of x.

    Absent gains are ones, absent biases zeros. Source: Ba, Kiros and Hinton (1607.06450).
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps) * centred
    y = y * _along(x, parameters["weight"]) if "weight" in parameters else y
    return (y + _along(x, parameters["bias"]) if "bias" in parameters else y).astype(x.dtype)
