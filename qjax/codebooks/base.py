"""The codebook contract."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Shaped, UInt32

from qjax.registry import Registry

__all__ = ["CODEBOOKS", "Codebook"]


@runtime_checkable
class Codebook(Protocol):
    """A finite set of tiles.

    Instances are frozen dataclass pytrees: tables are leaves, everything else is static and hashable.

    Attributes:
      bits: bits per weight of the code stream (without scales and signs).
      tile: (rows, cols) that are coded jointly: scalar (1, 1), E8P (1, 8), trellis (16, 16).
      rms: the input RMS that the codebook is meant for: a Gaussian of variance 1 is multiplied by it before `quantize`.
    """

    bits: float
    tile: tuple[int, int]
    rms: float

    def quantize(self, x: Float[Array, "m n"]) -> Shaped[Array, "..."]:
        """Integer codes `[m/rows, n/cols, ...]`: the nearest (or Viterbi-best) codeword of every tile."""
        ...

    def dequantize(self, codes: Shaped[Array, "..."]) -> Float[Array, "m n"]:
        """The values `[m, n]` of the codes, float32."""
        ...

    def pack(self, codes: Shaped[Array, "..."]) -> UInt32[Array, " words"]:
        """A flat bit stream of exactly `ceil(bits·m·n / 32)` words."""
        ...

    def unpack(self, packed: UInt32[Array, " words"], shape: tuple[int, int]) -> Shaped[Array, "..."]:
        """The inverse of `pack` for a matrix of `shape` (m, n), bit-exact."""
        ...

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this codebook again (JSON values only)."""
        ...


CODEBOOKS: Registry[Codebook] = Registry("codebook", "qjax.codebooks.CODEBOOKS")
