"""A quantised weight matrix: packed codes, signs and scales, decoded only where it is used."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.incoherence import Transform
from qjax.linalg.rotations import Leaf

__all__ = ["QuantizedMatrix"]


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
    """

    packed: Leaf
    scaling: Scaling
    transform: Transform
    codebook: Codebook
    permutation: Leaf = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it stands for."""
        return self.transform.shape

    @property
    def bits_per_weight(self) -> float:
        """`stored_bits` per weight: codes with their padding, scales, zeros, signs, permutation; no shared tables."""
        out, inner = self.shape
        return self.stored_bits / (out * inner)

    @property
    def stored_bits(self) -> int:
        """All stored bits except the codebook's shared tables."""
        parts = (self.packed, self.scaling, self.transform, self.permutation)
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))

    @property
    def table_bits(self) -> int:
        """Bits of the codebook's tables, counted once for a model that shares them."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.codebook))

    def rotated(self) -> Float[Array, "padded_out padded_in"]:
        """Q: the decoded matrix in the rotated basis, float32."""
        values = self.codebook.dequantize(self.codebook.unpack(self.packed, self.transform.padded))
        values = self.scaling.denormalize(values)
        if self.permutation is None:
            return values
        return jnp.take(values, jnp.argsort(self.permutation), axis=1)

    def dequantize(self) -> Float[Array, "out in"]:
        """The dense matrix `Uᵀ Q V` in the original basis, float32."""
        return self.transform.weight_inverse(self.rotated())

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x.

        Few rows of x are rotated, `Uᵀ (Q (V x))`; for more rows than the matrix has, the matrix is rotated.
        """
        if math.prod(x.shape[:-1]) > max(self.shape):
            return jnp.einsum("...i,oi->...o", x, self.dequantize().astype(x.dtype))
        rotated = self.transform.input(x)
        y = jnp.einsum("...i,oi->...o", rotated, self.rotated().astype(rotated.dtype))
        return self.transform.output(y).astype(x.dtype)

    def spec(self) -> dict[str, Any]:
        """The static part as JSON values (for reports and artifacts)."""
        return {"shape": list(self.shape), "padded": list(self.transform.padded), "codebook": self.codebook.spec()}
