"""The incoherence processing of one matrix: rotate a weight and its Hessians, and undo it exactly.

`W̃ = R_outᵀ W R_in`, `H̃_in = R_inᵀ H_in R_in`, `H̃_out = R_outᵀ H_out R_out` with R orthogonal, so that
`tr(H_out E H_in Eᵀ)` does not change. In the letters of QuIP (2307.13304), `U = R_outᵀ` and `V = R_inᵀ`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.incoherence.rotations import Rotation
from qjax.typing import Leaf, pytree, static

__all__ = ["Transform", "widened"]


def widened(x: Array) -> Array:
    """In float32 at least: weights and Hessians must not be rounded to a half-precision type on the way."""
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def _pad(x: Array, *sizes: int) -> Array:
    """Zeros at the end of the last axes, up to `sizes`."""
    lead = x.ndim - len(sizes)
    widths = [(0, 0)] * lead + [(0, size - x.shape[lead + i]) for i, size in enumerate(sizes)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


# How many rows of a large Hessian are rotated at a time: a rotation needs several times the memory of what it rotates.
_ROWS = 1024


def _rotated(rotation: Rotation, matrix: Array | None, into: Array, transposed: bool) -> Array:
    """`matrix R`, or its transpose, written over `into` some rows at a time; `into R` without a matrix."""

    def step(place: Array, into: Array) -> Array:
        start = place * _ROWS
        part = rotation.apply(jax.lax.dynamic_slice_in_dim(into if matrix is None else matrix, start, _ROWS))
        return jax.lax.dynamic_update_slice_in_dim(into, part.T if transposed else part, start, axis=int(transposed))

    return jax.lax.fori_loop(0, into.shape[0] // _ROWS, step, into)


def _congruence(hessian: Array, rotation: Rotation | None, size: int) -> Array:
    """`Rᵀ H R` of the zero-padded H, for a symmetric H."""
    h = _pad(widened(hessian), size, size)
    if rotation is None:
        return h
    if size <= _ROWS or size % _ROWS:
        return rotation.apply(rotation.apply(h).T)
    return _rotated(rotation, None, _rotated(rotation, h, jnp.zeros_like(h), transposed=True), transposed=False)


@pytree
class Transform:
    """The incoherence processing of one matrix [m, n], zero-padded to [M, N] before it is rotated.

    Attributes:
      output_rotation: R_out [M, M], or None for the identity.
      input_rotation: R_in [N, N], or None for the identity.
      rescale: s [n] float16, the diagonal rescaling of the inputs, or None.
      shape: (m, n).
      padded: (M, N).
    """

    output_rotation: Rotation | None
    input_rotation: Rotation | None
    rescale: Leaf | None
    shape: tuple[int, int] = static()
    padded: tuple[int, int] = static()

    def _expect(self, what: str, found: tuple[int, ...], allowed: tuple[int, ...]) -> None:
        if found != allowed:
            raise InputError(
                f"{what} has shape {list(found)}; this transform of a {list(self.shape)} matrix takes {list(allowed)}"
            )

    def _scale(self, x: Array) -> Array:
        assert self.rescale is not None
        return self.rescale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def weight(self, weight: Float[Array, "m n"]) -> Float[Array, "M N"]:
        """`W̃ = R_outᵀ (W diag(s)) R_in`, float32 at least. Raises InputError for another shape than [m, n]."""
        self._expect("the weight", weight.shape, self.shape)
        w = widened(weight)
        w = _pad(w if self.rescale is None else w * self._scale(w), *self.padded)
        w = w if self.input_rotation is None else self.input_rotation.apply(w)
        return w if self.output_rotation is None else self.output_rotation.apply(w.T).T

    def weight_inverse(self, rotated: Float[Array, "M N"]) -> Float[Array, "m n"]:
        """`W = R_out W̃ R_inᵀ diag(1/s)`, the padding cut off. Raises InputError for another shape than [M, N]."""
        self._expect("the rotated weight", rotated.shape, self.padded)
        m, n = self.shape
        w = widened(rotated)
        w = w if self.output_rotation is None else self.output_rotation.apply_transpose(w.T).T
        w = w[:m] if self.input_rotation is None else self.input_rotation.apply_transpose(w[:m])
        w = w[:, :n]
        return w if self.rescale is None else w / self._scale(w)

    def input_hessian(self, hessian: Float[Array, "n n"]) -> Float[Array, "N N"]:
        """`H̃ = R_inᵀ diag(1/s) H diag(1/s) R_in`. Raises InputError for another shape than [n, n]."""
        n = self.shape[1]
        self._expect("the input Hessian", hessian.shape, (n, n))
        h = widened(hessian)
        if self.rescale is not None:
            scale = self._scale(h)
            h = h / scale / scale.reshape(n, 1)
        return _congruence(h, self.input_rotation, self.padded[1])

    def output_hessian(self, hessian: Float[Array, "m m"]) -> Float[Array, "M M"]:
        """`H̃_out = R_outᵀ H_out R_out`. Raises InputError for another shape than [m, m]."""
        self._expect("the output Hessian", hessian.shape, (self.shape[0], self.shape[0]))
        return _congruence(hessian, self.output_rotation, self.padded[0])

    def input(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch N"]:
        """`x̃ = (x / s) R_in` in the dtype of x; `output(x̃ W̃ᵀ) = x Wᵀ`. Raises InputError for another width than n."""
        self._expect("the input", x.shape[-1:], self.shape[1:])
        x = _pad(x if self.rescale is None else x / self._scale(x), self.padded[1])
        return x if self.input_rotation is None else self.input_rotation.apply(x)

    def output(self, y: Float[Array, "*batch M"]) -> Float[Array, "*batch m"]:
        """`y = ỹ R_outᵀ` in the dtype of ỹ, the padding cut off. Raises InputError for another width than M."""
        self._expect("the output", y.shape[-1:], self.padded[:1])
        y = y if self.output_rotation is None else self.output_rotation.apply_transpose(y)
        return y[..., : self.shape[0]]

    @property
    def bits_stored(self) -> int:
        """The number of bits of all stored arrays (signs as whole 32-bit words); works on an abstract transform too."""
        return sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(self))
