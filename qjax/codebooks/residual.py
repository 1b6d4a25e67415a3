"""Residual lattice codebooks of 3 and 4 bits: E8P, and a second codebook on what it leaves (QuIP#, appendix F.5).

`q(x) = q₀ + q₁ / r` with `q₀ ∈ E8P` and `q₁ ∈ E81B` (3 bits) or E8P (4 bits). A code is `i₀ << 16 | i₁` in 32 bits;
packed, it takes 24 or 32. Stage by stage, `q₀` is nearest to x and `q₁` to `r·(x − q₀)`; a beam keeps several `q₀` and
takes the pair with the least error (for a Gaussian at 4 bits, a beam of four has 9% less error, at 3 bits 0.5%).
"""

from __future__ import annotations

from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt32

from qjax.codebooks.base import CODEBOOKS
from qjax.codebooks.bitstream import pack_bits, unpack_bits
from qjax.codebooks.e8p import E8P, MAX_CANDIDATES, e8p
from qjax.codebooks.e81b import E81B, e81b
from qjax.codebooks.vector import VectorCodebook, check_bits, check_rms
from qjax.errors import InputError, listed
from qjax.registry import Count, OneOf, Positive
from qjax.typing import pytree, static

__all__ = ["ResidualE8P", "e8p_rvq"]

SCALES = {
    ("shipped", 3): (0.98, 2.04),
    ("shipped", 4): (1.03, 3.45),
    ("retuned", 3): (0.98, 2.04),
    ("retuned", 4): (0.90, 3.7),
}
"""(input RMS, residual scale r) by variant and bits: as published, and (to 0.6%) the least error for a Gaussian."""

_BEAM_TILES = 4096  # tiles whose candidates are held at once


@pytree
class ResidualE8P(VectorCodebook):
    """Three or four bits per weight, tiles of 1×8, uint32 codes.

    Attributes:
      residual_scale: r, the factor on the first stage's error.
      beam: number of first-stage codewords that are tried per tile; 1 is stage by stage.
      first: the codebook of the first stage.
      second: the codebook of the second stage.
    """

    dim = 8

    residual_scale: float = static()
    beam: int = static()
    first: E8P
    second: E8P | E81B

    @property
    def code_dtype(self) -> np.dtype:
        """Codes have two halves of 16 bits."""
        return np.dtype(np.uint32)

    def quantize(self, x: Float[Array, "m n"]) -> UInt32[Array, "m n//8"]:
        """Codes of the stage-by-stage or the beam search's choice. Raises InputError when n is not a multiple of 8."""
        self.split(x)
        if self.beam == 1:
            code = self.first.quantize(x)
            return self._join(code, self._second_stage(x, code))
        count = x.size // self.dim
        block = min(_BEAM_TILES, max(count, 1))
        tiles = jnp.pad(x.reshape(count, self.dim), ((0, -count % block), (0, 0)))
        codes = lax.map(self._search, tiles.reshape(-1, block, self.dim))
        return codes.reshape(-1)[:count].reshape(x.shape[0], x.shape[1] // self.dim)

    def dequantize(self, codes: UInt32[Array, "m groups"]) -> Float[Array, "m groups*8"]:
        """`q₀ + q₁ / r`."""
        first = self.first.dequantize((codes >> 16).astype(jnp.uint16))
        second = self.second.dequantize((codes & np.uint32(0xFFFF)).astype(self.second.code_dtype))
        return first + second / np.float32(self.residual_scale)

    def pack(self, codes: UInt32[Array, "m groups"]) -> UInt32[Array, " words"]:
        """`ceil(bits·m·n / 32)` words; a 3-bit code is packed as `i₀ << 8 | i₁`."""
        width = self.second.code_bits
        low = codes & np.uint32(0xFFFF)
        return pack_bits((codes >> 16 << width) | low, self.code_bits)

    def unpack(self, packed: UInt32[Array, " words"], shape: tuple[int, int]) -> UInt32[Array, "m groups"]:
        """The inverse of `pack`. Raises InputError when the number of words is not that of `shape`."""
        width = self.second.code_bits
        groups = shape[1] // self.dim
        word = unpack_bits(packed, self.code_bits, shape[0] * groups).reshape(shape[0], groups)
        return (word >> width << 16) | (word & np.uint32(2**width - 1))

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this codebook again."""
        return {**super().spec(), "residual_scale": self.residual_scale, "beam": self.beam}

    def _second_stage(self, x: Array, code: Array) -> Array:
        return self.second.quantize((x - self.first.dequantize(code).astype(x.dtype)) * self.residual_scale)

    def _join(self, first: Array, second: Array) -> Array:
        return (first.astype(jnp.uint32) << 16) | second.astype(jnp.uint32)

    def _search(self, tiles: Float[Array, "block 8"]) -> UInt32[Array, " block"]:
        first = self.first.candidates(tiles, self.beam).reshape(-1, 1)
        targets = jnp.tile(tiles, (self.beam, 1))
        codes = self._join(first, self._second_stage(targets, first))
        error = jnp.sum(jnp.square(self.dequantize(codes).astype(tiles.dtype) - targets), axis=1)
        best = jnp.argmin(error.reshape(self.beam, -1), axis=0, keepdims=True)
        return jnp.take_along_axis(codes.reshape(self.beam, -1), best, axis=0, mode="clip")[0]


@CODEBOOKS.register("e8p_rvq")
def e8p_rvq(
    bits: int | float,
    scales: Annotated[str, OneOf("shipped", "retuned")] = "shipped",
    residual_scale: Positive | None = None,
    rms: Positive | None = None,
    beam: Count = 1,
) -> ResidualE8P:
    """E8P with a residual stage: 3 bits (E81B) or 4 bits (E8P).

    Args:
      bits: 3 or 4.
      scales: "shipped" for the constants of QuIP#'s checkpoints, "retuned" for those that suit a Gaussian best.
      residual_scale: r; overrides that of `scales`.
      rms: the input RMS; overrides that of `scales`.
      beam: first-stage codewords to try, 1 to `MAX_CANDIDATES`.

    Raises InputError for other values.
    """
    bits = check_bits("e8p_rvq", bits)
    if (scales, bits) not in SCALES:
        raise InputError(
            f"codebook 'e8p_rvq': scales is {scales!r}; allowed are {listed({name for name, _ in SCALES})}"
        )
    if not 1 <= beam <= MAX_CANDIDATES or beam != int(beam):
        raise InputError(f"codebook 'e8p_rvq': beam is {beam}; it is a whole number from 1 to {MAX_CANDIDATES}")
    default_rms, default_scale = SCALES[scales, bits]
    residual_scale = default_scale if residual_scale is None else float(residual_scale)
    if not 0 < residual_scale < np.inf:
        raise InputError(
            f"codebook 'e8p_rvq': residual_scale is {residual_scale}; it is a positive number, "
            f"{default_scale} by default"
        )
    second = e81b() if bits == 3 else e8p()
    return ResidualE8P(
        "e8p_rvq", bits, check_rms("e8p_rvq", rms, default_rms), residual_scale, int(beam), e8p(), second
    )
