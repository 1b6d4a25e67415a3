"""A quantised weight matrix: packed codes, signs and scales, decoded only where it is used."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.incoherence.families import Transform
from qjax.typing import Leaf

__all__ = ["QuantizedMatrix"]


def _gained(x: Array, gain: Array | np.ndarray | None) -> Array:
    """x with its last axis multiplied by a gain, in the dtype of x."""
    return x if gain is None else x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@struct.dataclass
class QuantizedMatrix:
    """`W ≈ Uᵀ Q V` for a matrix [out, in]: Q the decoded codes in the rotated basis of `transform`.

    Attributes:
      packed: uint32 `[words]`, the code stream of the padded, rotated matrix.
      scaling: scales and zeros that bring codewords to weights.
      transform: the incoherence processing, including the padding to whole tiles and Hadamard orders.
      codebook: decodes the stream; its tables, if any, are shared by the whole model.
      permutation: the column order in which the codes were made (`rotated[:, permutation]` was rounded),
        unsigned `[in]`, or None.
      output_gain, input_gain: a `[out]` and b `[in]`, of a tuned matrix: `W ≈ diag(a) Uᵀ Q V diag(b)`; None means ones.
        With a randomised Hadamard transform the products with its signs are the real-valued SU and SV of QuIP#.
    """

    packed: Leaf
    scaling: Scaling
    transform: Transform
    codebook: Codebook
    permutation: Leaf = None
    output_gain: Leaf = None
    input_gain: Leaf = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it stands for."""
        return self.transform.shape

    @property
    def bits_per_weight(self) -> float:
        """`stored_bits` per weight: codes and padding, scales, zeros, signs, permutation, gains; no shared tables."""
        out, inner = self.shape
        return self.stored_bits / (out * inner)

    @property
    def stored_bits(self) -> int:
        """All stored bits except the codebook's shared tables."""
        parts = (self.packed, self.scaling, self.transform, self.permutation, self.output_gain, self.input_gain)
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))

    @property
    def table_bits(self) -> int:
        """Bits of the codebook's tables, counted once for a model that shares them."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.codebook))

    def codewords(self) -> Float[Array, "padded_out padded_in"]:
        """The decoded values in units of the weight and in the order in which they were coded, float32."""
        return self.scaling.denormalize(
            self.codebook.dequantize(self.codebook.unpack(self.packed, self.transform.padded))
        )

    def rotated(self, values: Float[Array, "padded_out padded_in"] | None = None) -> Array:
        """Q `[padded_out, padded_in]`: the decoded matrix, or `values` for its codewords, in the rotated basis."""
        values = self.codewords() if values is None else values
        if self.permutation is None:
            return values
        return jnp.take(values, jnp.argsort(self.permutation), axis=1)

    def dequantize(self, values: Float[Array, "padded_out padded_in"] | None = None) -> Float[Array, "out in"]:
        """The dense matrix `diag(a) Uᵀ Q V diag(b)` in the original basis, float32; with `values` for its codewords."""
        w = self.transform.weight_inverse(self.rotated(values))
        w = w if self.output_gain is None else w * self.output_gain.astype(w.dtype).reshape(-1, 1)
        return _gained(w, self.input_gain)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x.

        Few rows of x are rotated, `Uᵀ (Q (V x))`; where rotating the matrix on both sides takes fewer values than
        rotating rows (in and out) `rows · (in + out) > 2 · in · out`, the matrix is.
        """
        if math.prod(x.shape[:-1]) * sum(self.shape) > 2 * math.prod(self.shape):
            return jnp.einsum("...i,oi->...o", x, self.dequantize().astype(x.dtype))
        rotated = self.transform.input(_gained(x, self.input_gain))
        y = jnp.einsum("...i,oi->...o", rotated, self.rotated().astype(rotated.dtype))
        return _gained(self.transform.output(y), self.output_gain).astype(x.dtype)

    def spec(self) -> dict[str, Any]:
        """The static part as JSON values (for reports and artifacts)."""
        return {"shape": list(self.shape), "padded": list(self.transform.padded), "codebook": self.codebook.spec()}
