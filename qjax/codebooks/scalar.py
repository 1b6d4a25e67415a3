"""Scalar codebooks: one code per weight (tile 1×1), 1 to 8 bits.

`grid`         integers 0 … 2^b − 1, for affine (scale, zero) quantisation as in GPTQ
`half_integer` symmetric ±½, ±3/2, …, with the scale that is best for a Gaussian
`quip_grid`    the same levels, stretched so that the outermost ones lie at ±2.4 RMS (QuIP, section 4)
`lloyd_max`    the non-uniform levels that are best for a Gaussian
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.bitstream import pack_bits, unpack_bits
from qjax.codebooks.gaussian import lloyd_max_levels, optimal_rms
from qjax.errors import InputError
from qjax.registry import Positive
from qjax.typing import Leaf, pytree, static

__all__ = ["LevelCodebook", "ScalarCodebook", "UniformCodebook", "grid", "half_integer", "lloyd_max", "quip_grid"]


@pytree
class ScalarCodebook:
    """Base class of scalar codebooks: 1×1 tiles, uint8 codes in row-major order, `bits` bits each.

    Attributes:
      name: the registered name.
      bits: bits per weight.
      rms: the input RMS that the codebook is meant for.
    """

    name: str = static()
    bits: int = static()
    rms: float = static()

    @property
    def tile(self) -> tuple[int, int]:
        """One row and one column."""
        return (1, 1)

    def pack(self, codes: UInt8[Array, "m n"]) -> UInt32[Array, " words"]:
        """`ceil(bits·m·n / 32)` words, row-major."""
        return pack_bits(codes, self.bits)

    def unpack(self, packed: UInt32[Array, " words"], shape: tuple[int, int]) -> UInt8[Array, "m n"]:
        """The inverse of `pack`. Raises InputError when the number of words is not that of `shape`."""
        return unpack_bits(packed, self.bits, shape[0] * shape[1]).astype(jnp.uint8).reshape(shape)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this codebook again."""
        return {"name": self.name, "bits": self.bits, "rms": self.rms}


@pytree
class UniformCodebook(ScalarCodebook):
    """Levels `first + 0, 1, …, 2^bits − 1`."""

    first: float = static(default=0.0)

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels, ascending."""
        return tuple(self.first + i for i in range(2**self.bits))

    def quantize(self, x: Float[Array, "m n"]) -> UInt8[Array, "m n"]:
        """The nearest level's index; halves round up (`floor(x + ½)`), values outside are clamped."""
        index = jnp.floor(x - self.first + 0.5)
        return jnp.clip(index, 0, 2**self.bits - 1).astype(jnp.uint8)

    def quantize_stochastic(self, x: Float[Array, "m n"], key: Array) -> UInt8[Array, "m n"]:
        """`floor(x + u)`, u ~ U[0, 1): unbiased inside the grid's range, clamped outside."""
        index = jnp.floor(x - self.first + jax.random.uniform(key, x.shape, x.dtype))
        return jnp.clip(index, 0, 2**self.bits - 1).astype(jnp.uint8)

    def dequantize(self, codes: UInt8[Array, "m n"]) -> Float[Array, "m n"]:
        """`first + code`."""
        return codes.astype(jnp.float32) + self.first


@pytree
class LevelCodebook(ScalarCodebook):
    """An arbitrary ascending table of `2^bits` levels (a leaf)."""

    levels: Leaf = dataclasses.field(default_factory=lambda: np.zeros(2, np.float32))

    def quantize(self, x: Float[Array, "m n"]) -> UInt8[Array, "m n"]:
        """The nearest level's index: the number of cell edges at or below x."""
        edges = ((self.levels[1:] + self.levels[:-1]) / 2).astype(x.dtype)
        if self.bits <= 4:  # a handful of compares fuses; a search does not
            above = ((x >= edges[i]).astype(jnp.uint8) for i in range(2**self.bits - 1))
            return functools.reduce(operator.add, above)
        return jnp.searchsorted(edges, x, side="right").astype(jnp.uint8)

    def quantize_stochastic(self, x: Float[Array, "m n"], key: Array) -> UInt8[Array, "m n"]:
        """One of the two levels around x, with probabilities that make the result unbiased inside the range."""
        below = jnp.clip(jnp.searchsorted(self.levels, x, side="right") - 1, 0, 2**self.bits - 2)
        low, high = jnp.take(self.levels, below), jnp.take(self.levels, below + 1)
        up = jax.random.uniform(key, x.shape, x.dtype) * (high - low) < x - low
        return below.astype(jnp.uint8) + up.astype(jnp.uint8)

    def dequantize(self, codes: UInt8[Array, "m n"]) -> Float[Array, "m n"]:
        """The table entry of every code."""
        return jnp.take(self.levels, codes.astype(jnp.int32), axis=0, mode="clip")


def _check(name: str, bits: int | float) -> int:
    if bits != int(bits) or not 1 <= bits <= 8:
        raise InputError(
            f"codebook {name!r} has 1 to 8 whole bits per weight, not {bits}; for a fraction use rules per layer"
        )
    return int(bits)


@CODEBOOKS.register("grid")
def grid(bits: int | float, rms: Positive | None = None) -> UniformCodebook:
    """Integers `0 … 2^bits − 1`, to be used with a scale and a zero per row or group (GPTQ, section 3).

    Args:
      bits: per weight.
      rms: the input RMS, for a scale by RMS; None is what suits a Gaussian best.
    """
    bits = _check("grid", bits)
    return UniformCodebook("grid", bits, rms or _symmetric_rms(bits), 0.0)


@CODEBOOKS.register("half_integer")
def half_integer(bits: int | float, rms: Positive | None = None) -> UniformCodebook:
    """Symmetric levels `±½, ±3/2, …`.

    Args:
      bits: per weight.
      rms: the input RMS; None is the Gaussian optimum (0.63, 1.005, 1.71, 2.985 at 1–4 bits).
    """
    bits = _check("half_integer", bits)
    return UniformCodebook("half_integer", bits, rms or _symmetric_rms(bits), -(2**bits - 1) / 2)


@CODEBOOKS.register("quip_grid")
def quip_grid(bits: int | float, rms: Positive | None = None) -> UniformCodebook:
    """`2^bits` uniform levels on ±2.4 RMS: in units of the step the RMS is `(2^bits − 1) / 4.8` (QuIP, section 4).

    Args:
      bits: per weight.
      rms: the input RMS; None is QuIP's.
    """
    bits = _check("quip_grid", bits)
    return UniformCodebook("quip_grid", bits, rms or (2**bits - 1) / 4.8, -(2**bits - 1) / 2)


@CODEBOOKS.register("lloyd_max")
def lloyd_max(bits: int | float, rms: Positive | None = None) -> LevelCodebook:
    """The Lloyd–Max quantiser of N(0, 1): distortion 0.3634, 0.1175, 0.03455, 0.00950 at 1–4 bits.

    Args:
      bits: per weight.
      rms: the input RMS; None is 1, for which the levels are best.
    """
    bits = _check("lloyd_max", bits)
    return LevelCodebook("lloyd_max", bits, rms or 1.0, np.asarray(lloyd_max_levels(bits), np.float32))


@functools.cache
def _symmetric_rms(bits: int) -> float:
    return round(optimal_rms(np.arange(2**bits) - (2**bits - 1) / 2), 5)
