"""Base class of the lattice codebooks, one code per `1 × dim` tile; tables of half-integers in four bits each."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, UInt, UInt32

from qjax.codebooks.bitstream import pack_bits, unpack_bits
from qjax.errors import InputError, listed
from qjax.typing import pytree, static

__all__ = ["VectorCodebook", "check_bits", "check_rms", "nibble_table", "nibble_values"]

_WIDTHS = {
    "d4": (2,),
    "e81b": (1,),
    "e8p": (2,),
    "e8p_rvq": (3, 4),
    "half_integer": range(1, 9),
    "lloyd_max": range(1, 9),
    "trellis": range(1, 9),
}


@pytree
class VectorCodebook:
    """A codebook of `1 × dim` tiles whose codes `[m, n/dim]` have `code_bits` bits; `bits = code_bits / dim`.

    Attributes:
      name: the registered name.
      bits: bits per weight.
      rms: the input RMS that the codebook is meant for.
    """

    dim: ClassVar[int]

    name: str = static()
    bits: int = static()
    rms: float = static()

    @property
    def tile(self) -> tuple[int, int]:
        """One row, `dim` columns."""
        return (1, self.dim)

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return self.bits * self.dim

    @property
    def code_dtype(self) -> np.dtype:
        """The smallest unsigned integer that holds a code."""
        return np.dtype(np.min_scalar_type(2**self.code_bits - 1))

    def split(self, x: Float[Array, "m n"]) -> list[Array]:
        """The `dim` coordinates of all tiles, each `[m, n/dim]`. Raises InputError when `dim` does not divide n."""
        if x.ndim != 2 or x.shape[1] % self.dim:
            shape = "×".join(map(str, x.shape)) or "a scalar"
            raise InputError(
                f"codebook {self.name!r} codes {self.dim} columns of a row together, found a matrix of {shape}; "
                f"pad the columns to a multiple of {self.dim}, or use a scalar codebook such as half_integer"
            )
        tiles = x.reshape(x.shape[0], x.shape[1] // self.dim, self.dim)
        return [tiles[:, :, i] for i in range(self.dim)]

    def pack(self, codes: UInt[Array, "m groups"]) -> UInt32[Array, " words"]:
        """`ceil(bits·m·n / 32)` words, row-major, `code_bits` bits per code."""
        return pack_bits(codes, self.code_bits)

    def unpack(self, packed: UInt32[Array, " words"], shape: tuple[int, int]) -> UInt[Array, "m groups"]:
        """The inverse of `pack`. Raises InputError when the number of words is not that of `shape`."""
        groups = shape[1] // self.dim
        codes = unpack_bits(packed, self.code_bits, shape[0] * groups)
        return codes.astype(self.code_dtype).reshape(shape[0], groups)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this codebook again."""
        return {"name": self.name, "bits": self.bits, "rms": self.rms}


def check_bits(name: str, bits: int | float) -> int:
    """`bits` as an int. Raises InputError naming the widths of codebook `name` and the codebooks with `bits` bits."""
    if bits in _WIDTHS[name]:
        return int(bits)
    others = listed(other for other, widths in _WIDTHS.items() if bits in widths)
    allowed = " or ".join(map(str, _WIDTHS[name]))
    raise InputError(
        f"codebook {name!r} has {allowed} bits per weight, not {bits}; codebooks with {bits} bits: {others}"
    )


def check_rms(name: str, rms: float | None, default: float) -> float:
    """`rms`, or the default for None. Raises InputError unless it is positive and finite."""
    rms = default if rms is None else float(rms)
    if not 0 < rms < np.inf:
        raise InputError(f"codebook {name!r}: rms is {rms}; it is a positive number, {default} by default")
    return rms


def nibble_table(values: np.ndarray, positions: tuple[int, ...]) -> np.ndarray:
    """Rows of half-integers in [−4, 7/2] as uint32 words: coordinate i is `2·value + 8` in nibble `positions[i]`."""
    nibbles = (2 * values + 8).astype(np.uint32)
    return np.bitwise_or.reduce(nibbles << (4 * np.asarray(positions, np.uint32)), axis=-1)


def nibble_values(
    words: UInt32[Array, "m groups"], flips: Integer[Array, "m groups"] | None, positions: tuple[int, ...]
) -> Float[Array, "m groups dim"]:
    """The inverse of `nibble_table`; bit `positions[i]` of `flips` negates coordinate i (of an odd half-integer).

    Coordinate by coordinate: shifts by a constant are vectorised, shifts by an array along a short axis are not.
    """
    columns = []
    for position in positions:
        nibbles = (words >> np.uint32(4 * position)) & np.uint32(15)
        if flips is not None:
            # An odd nibble 8 + 2v becomes 8 − 2v = 16 − nibble when its upper three bits are inverted.
            nibbles = nibbles ^ (((flips.astype(jnp.uint32) >> np.uint32(position)) & np.uint32(1)) * np.uint32(14))
        columns.append(nibbles.astype(jnp.float32) * np.float32(0.5) - np.float32(4))
    return jnp.stack(columns, axis=-1)
