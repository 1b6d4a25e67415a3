"""Random orthogonal matrices R that are stored in few bits and applied fast along the last axis."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qjax.errors import InputError
from qjax.linalg.hadamard import block_hadamard_transform, hadamard_factor, hadamard_transform
from qjax.linalg.orthogonal import TwoStage, two_stage, two_stage_transform
from qjax.registry import Registry
from qjax.typing import Leaf, pytree, static

__all__ = ["ROTATIONS", "Rotation", "SignedHadamard", "TwoStageOrthogonal"]

_WORD = 32


@runtime_checkable
class Rotation(Protocol):
    """An orthogonal matrix R of `size`, as a pytree."""

    @property
    def size(self) -> int:
        """The length of the axis."""
        ...

    def apply(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`x @ R`, in the dtype of x."""
        ...

    def apply_transpose(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`x @ Rᵀ`, the inverse of `apply`."""
        ...

    def spec(self) -> dict[str, Any]:
        """The name in `ROTATIONS` and the static fields as JSON values."""
        ...


ROTATIONS: Registry[Rotation] = Registry("rotation", "qjax.incoherence.ROTATIONS")
"""Builders of a rotation from its `spec()` and its arrays; raises InputError where they do not fit together."""


@pytree
class SignedHadamard:
    """`R = diag(s) Had`: random signs, then a Hadamard transform of the whole axis or of blocks of it.

    Attributes:
      words: [ceil(size/32)] uint32, the signs, one bit each (1 is −1): sign i at bit
        `i mod 32` of word `i // 32`; unused bits are 0.
      size: the length of the axis.
      block: the length of the independent transforms; `size` for a full transform.
    """

    words: Leaf
    size: int = static()
    block: int = static()

    @classmethod
    def sample(cls, key: Key[Array, ""], size: int, block: int | None = None) -> SignedHadamard:
        """Independent fair signs from `key`."""
        words = jax.random.bits(key, (-(-size // _WORD),), jnp.uint32)
        if size % _WORD:
            words = words.at[-1].set(words[-1] & jnp.uint32((1 << size % _WORD) - 1))
        return cls(words, size, block or size)

    def signs(self) -> Float[Array, " size"]:
        """s, float32 ±1."""
        shifts = jnp.arange(_WORD, dtype=jnp.uint32).reshape(1, _WORD)
        bits = (self.words.reshape(-1, 1) >> shifts) & jnp.uint32(1)
        return 1 - 2 * bits.reshape(-1)[: self.size].astype(jnp.float32)

    def _flip(self, x: Array) -> Array:
        return x * self.signs().astype(x.dtype).reshape((1,) * (x.ndim - 1) + (self.size,))

    def _transform(self, x: Array, transpose: bool) -> Array:
        if self.block == self.size:
            return hadamard_transform(x, transpose=transpose)
        return block_hadamard_transform(x, self.block, transpose=transpose)

    def apply(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`(x ⊙ s) Had`."""
        return self._transform(self._flip(x), transpose=False)

    def apply_transpose(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`(x Hadᵀ) ⊙ s`."""
        return self._flip(self._transform(x, transpose=True))

    def spec(self) -> dict[str, Any]:
        """Name, size and block."""
        return {"name": "signed_hadamard", "size": self.size, "block": self.block}


@ROTATIONS.register("signed_hadamard")
def _signed_hadamard(words: Leaf, size: int, block: int) -> SignedHadamard:
    if not type(size) is type(block) is int or size < 1 or block < 1 or size % block:
        raise InputError(f"Hadamard transforms of {block!r} in an axis of {size!r}; whole blocks fill it")
    hadamard_factor(block)
    if words.dtype != jnp.uint32 or words.shape != (-(-size // _WORD),):
        raise InputError(f"the signs of {size} values are {words.dtype}{list(words.shape)}; it is a bit for each")
    return SignedHadamard(words, size, block)


@pytree
class TwoStageOrthogonal:
    """QuIP's random orthogonal matrix, stored as a 64-bit key and drawn again from it whenever it is applied.

    The factors of a 4096-wide layer would take as many bits as one bit per weight; the key takes 64. The price is the
    time to draw them, and that a stored matrix is tied to jax's threefry generator (a test pins its values) and to
    float32 rounding of the QR.

    Attributes:
      seed: [2] uint32, the key's data.
      size: the length of the axis.
      single: one factor per stage (a Kronecker product) instead of independent ones (a butterfly).
    """

    seed: Leaf
    size: int = static()
    single: bool = static()

    @classmethod
    def sample(cls, key: Key[Array, ""], size: int, single: bool = False) -> TwoStageOrthogonal:
        """A random seed from `key`, whatever that key's generator."""
        return cls(jax.random.bits(key, (2,), jnp.uint32), size, single)

    def factors(self) -> TwoStage:
        """The orthogonal factors and permutations."""
        return two_stage(
            jax.random.wrap_key_data(self.seed, impl="threefry2x32"),
            self.size,
            self.single,
        )

    def apply(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`x @ R`."""
        return two_stage_transform(x, self.factors())

    def apply_transpose(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """`x @ Rᵀ`."""
        return two_stage_transform(x, self.factors(), transpose=True)

    def spec(self) -> dict[str, Any]:
        """Name, size and mode."""
        return {"name": "two_stage_orthogonal", "size": self.size, "single": self.single}


@ROTATIONS.register("two_stage_orthogonal")
def _two_stage_orthogonal(seed: Leaf, size: int, single: bool) -> TwoStageOrthogonal:
    if type(size) is not int or type(single) is not bool or size < 1:
        raise InputError(f"a two-stage rotation of size {size!r}, single {single!r}; a whole number and a truth value")
    if seed.dtype != jnp.uint32 or seed.shape != (2,):
        raise InputError(f"the seed of a rotation is {seed.dtype}{list(seed.shape)}; it is uint32[2]")
    return TwoStageOrthogonal(seed, size, single)
