"""NVFP4: blocks of 16 E2M1 numbers, a scale in E4M3 per block and one in float32 per tensor."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax.errors import InputError
from qjax.formats.base import FORMATS, NumberFormat, blocked, padded_size, unblocked
from qjax.formats.floats import Float
from qjax.registry import Count, OneOf
from qjax.typing import HostOrDevice

__all__ = ["NVFP4", "nvfp4"]

_E2M1 = Float("e2m1", 2, 1, specials="none")
_E4M3 = Float("e4m3", 4, 3, specials="nan")
_TOP, _LARGEST_SCALE, _LEAST_SCALE = 6.0, 448.0, 2.0**-9
_NOTHING = 1e-30  # the tensor scale of zeros
_CODES = range(-3, 6)  # of E4M3 about amax / 6: from 0.75 to 1.5 times


@dataclasses.dataclass(frozen=True)
class NVFP4(NumberFormat):
    """`x ≈ e · s_block · s_tensor`: `s_tensor = max|x| / (6 · 448)`, `s_block = E4M3(max|block| / (6 s_tensor))`.

    `e` is x over the float32 product of both scales, rounded to E2M1. A block whose scale would be 0 has 2^−9.

    Attributes:
      name: for messages.
      block: values of the last axis with one scale; a shorter last block is filled up with zeros, which are counted.
      scale_rule: "nearest" rounds the block's scale to E4M3; "mse" takes the one of nine neighbouring codes, 0.75 to
        1.5 times that, with the least squared error of nearest rounding (the smallest where equal).
      tensor_scale: without, `s_tensor` is 1: small weights become 0, and blocks beyond 2688 are refused.
    """

    name: str = "nvfp4"
    block: Count = 16
    scale_rule: Annotated[str, OneOf("nearest", "mse")] = "nearest"
    tensor_scale: bool = True

    @property
    def element(self) -> Float:
        """E2M1."""
        return _E2M1

    @property
    def bits(self) -> float:
        """4, and 8 per block; the tensor's 32 are in `bits_of`."""
        return 4 + 8 / self.block

    def bits_of(self, shape: tuple[int, ...]) -> int:
        """Elements, scales and the tensor's scale, with the padding of the last axis."""
        padded = padded_size(shape[-1], self.block)
        return math.prod(shape[:-1]) * (padded * 4 + padded // self.block * 8) + 32 * self.tensor_scale

    def unit(self, x: Float32[Array, "*shape"]) -> Float32[Array, ""]:
        """The tensor's scale."""
        if not self.tensor_scale:
            return jnp.float32(1)
        top = jnp.max(jnp.abs(x), initial=0.0) / (_TOP * _LARGEST_SCALE)
        return jnp.where(top > _NOTHING, top, jnp.where(jnp.isnan(top), top, _NOTHING)).astype(jnp.float32)

    def scales(self, blocks: Float32[Array, "*blocks values"], unit: Array) -> Float32[Array, "*blocks"]:
        """The E4M3 scale of every block on the last axis, as float32."""
        top = jnp.max(jnp.abs(blocks), axis=-1) / (unit * _TOP)
        nearest = jnp.maximum(_E4M3.round_at(top, 0), _LEAST_SCALE)
        if self.scale_rule == "nearest":
            return nearest
        codes = _E4M3.encode(nearest).astype(jnp.int32)
        table = jnp.asarray(_E4M3.levels())
        size = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), _NOTHING)

        def error(scale: Array) -> Array:
            return jnp.sum(jnp.square((self._at(blocks, (scale * unit)[..., None]) - blocks) / size), axis=-1)

        tried = jnp.stack([table[jnp.clip(codes + step, 1, 126)] for step in _CODES])
        best = jnp.argmin(jax.lax.map(error, tried), axis=0)
        found = jnp.take_along_axis(tried, best[None], axis=0)[0]
        return jnp.where(jnp.isfinite(nearest), found, nearest)

    def _at(self, x: Array, scale: Array, rounding: str = "nearest", words: Array | None = None) -> Array:
        return _E2M1.round_at(x / scale, 0, rounding, words) * scale

    def _rounded(self, x: Array, rounding: str, words: Array | None) -> Array:
        parts, unit = blocked(x, self.block), self.unit(x)
        scale = (self.scales(parts, unit) * unit)[..., None]
        words = None if words is None else blocked(words, self.block)
        return unblocked(self._at(parts, scale, rounding, words), x.shape[-1])

    def _check(self, x: HostOrDevice, name: str) -> None:
        super()._check(x, name)
        largest = 0.0 if x.size == 0 else float(jnp.max(jnp.abs(jnp.asarray(x))))
        if not self.tensor_scale and largest > _TOP * _LARGEST_SCALE:
            raise InputError(
                f"{name} reaches {largest:.4g}, and without a tensor scale format 'nvfp4' reaches "
                f"{_TOP * _LARGEST_SCALE:g}; use tensor_scale=true"
            )


@FORMATS.register("nvfp4")
def nvfp4(
    scale_rule: Annotated[str, OneOf("nearest", "mse")] = "nearest", block: Count = 16, tensor_scale: bool = True
) -> NVFP4:
    """NVFP4: E2M1 with two levels of scales, 4.5 bits."""
    return NVFP4("nvfp4", block, scale_rule, tensor_scale)
