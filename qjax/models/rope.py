"""Rotary position embedding: frequencies, tables, the rotation of heads. Source: Su et al. (2104.09864)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.models.config import AttentionKind, Dynamic, Linear, LongRope, ModelConfig, RopeScaling, Scaling, Yarn
from qjax.typing import HostOrDevice

__all__ = ["rope_frequencies", "rope_tables", "rotate"]


def rope_frequencies(dims: int, theta: float, scaling: Scaling | None, length: int = 0) -> np.ndarray:
    """Radians per position `[dims/2]`, float64: `theta^(-2i/dims)`, changed by the scaling.

    `length` is the number of positions, on which `Dynamic` and `LongRope` depend.
    """
    half = dims // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    match scaling:
        case None:
            return frequency
        case Linear(factor):
            return frequency / factor
        case Dynamic(factor, original):
            if length <= original:
                return frequency
            grown = theta * (factor * length / original - factor + 1) ** (dims / (dims - 2))
            return grown ** (-np.arange(half, dtype=np.float64) / half)
        case LongRope():
            return frequency / np.asarray(scaling.long if length > scaling.original_max_positions else scaling.short)
        case Yarn():
            share = _slow_share(dims, theta, scaling)
            return frequency * (1 - share) + frequency / scaling.factor * share
        case RopeScaling():
            return _llama3(frequency, scaling)


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slow rotations divided by the factor, between two wavelengths a blend."""
    wavelength = 2 * np.pi / frequency
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * frequency / scaling.factor + blend * frequency
    slow = np.where(wavelength > low, frequency / scaling.factor, smooth)
    return np.where(wavelength < high, frequency, slow)


def _slow_share(dims: int, theta: float, scaling: Yarn) -> np.ndarray:
    """Of every frequency the share that is divided, 0 for fast and 1 for slow rotations (2309.00071, equation 18)."""

    def index(turns: float) -> float:
        return dims * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    return np.clip((np.arange(dims // 2, dtype=np.float64) - low) / max(high - low, 0.001), 0, 1)


def rope_tables(length: int, config: ModelConfig, kind: AttentionKind | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin `[length, dims/2]` of the rotary angles, computed in float64 on the host; of a layer's own kind."""
    theta, scaling = (config if kind is None else kind).rope_theta, (config if kind is None else kind).rope_scaling
    frequency = rope_frequencies(config.rotary_dim or config.head_dim, theta, scaling, length)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    factor = scaling.attention if isinstance(scaling, Yarn | LongRope) else 1.0
    return (np.cos(angle) * factor).astype(np.float32), (np.sin(angle) * factor).astype(np.float32)


def rotate(
    x: Float[Array, "batch length heads dim"],
    cos: Float[HostOrDevice, "#batch length half"],
    sin: Float[HostOrDevice, "#batch length half"],
) -> Array:
    """Rotate the pairs (i, i + half) of every head: the half-split convention of Hugging Face checkpoints.

    Values beyond the first `2 · half` of a head are left as they are.
    """
    turned, half = 2 * cos.shape[-1], cos.shape[-1]
    own = x.astype(jnp.float32)
    first, second = own[..., :half], own[..., half:turned]
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    parts = [first * c - second * s, second * c + first * s]
    if turned < x.shape[-1]:
        parts.append(own[..., turned:])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
