"""Rotary position embedding: frequencies, tables, the rotation of heads. Source: Su et al. (2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.models.config import ModelConfig, RopeScaling
from qjax.typing import HostOrDevice

__all__ = ["rope_frequencies", "rope_tables", "rotate"]


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position `[head_dim/2]`, float64: `theta^(-2i/head_dim)`, slow ones stretched by Llama 3's rule."""
    half = head_dim // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return frequency
    wavelength = 2 * np.pi / frequency
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * frequency / scaling.factor + blend * frequency
    slow = np.where(wavelength > low, frequency / scaling.factor, smooth)
    return np.where(wavelength < high, frequency, slow)


def rope_tables(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin `[length, head_dim/2]` of the rotary angles, computed in float64 on the host."""
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(
    x: Float[Array, "batch length heads dim"],
    cos: Float[HostOrDevice, "#batch length half"],
    sin: Float[HostOrDevice, "#batch length half"],
) -> Array:
    """Rotate the pairs (i, i + dim/2) of every head: the half-split convention of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)
