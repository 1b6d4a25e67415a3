"""The Hadamard transform of power-of-two order on XLA, and the ±1 matrices that all implementations use."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["factors", "hadamard", "sylvester"]

_RADIX_BITS = 5  # few passes with a small dense factor beat log2(n) butterflies on a CPU


@functools.cache
def sylvester(order: int) -> np.ndarray:
    """Sylvester's matrix of a power of two, entries ±1 (read-only): `H[i, j] = (−1)^popcount(i & j)`."""
    index = np.arange(order)
    odd = np.bitwise_count(index[:, None] & index) % 2
    matrix = 1 - 2 * odd.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def factors(block: int) -> tuple[int, ...]:
    """The orders of the factors that the GPU kernels multiply by, one up to 128, else two: multiply-adds per value."""
    left = 1 << (block.bit_length() // 2)
    return (block,) if block <= 128 else (left, block // left)


def hadamard(x: Float[Array, "*batch n"], block: int) -> Float[Array, "*batch n"]:
    """`x (I ⊗ H_block) / √block`, accumulated in float32."""
    y, rest = x.astype(jnp.float32) * (1 / math.sqrt(block)), block
    while rest > 1:
        radix = min(rest, 2**_RADIX_BITS)
        rest //= radix
        y = y.reshape(-1, radix, rest)
        y = jnp.einsum("bsi,st->bti", y, jnp.asarray(sylvester(radix)), precision="highest")
    return y.reshape(x.shape).astype(x.dtype)
