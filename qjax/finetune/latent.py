"""Quantised matrices by real values in place of codes, `[padded_out, padded_in]` in the rotated basis.

Rounded in every pass, the gradient going straight through, they are what quantisation-aware training tunes; as they
are, they carry the gradient by which codes are moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.finetune.discrete import nearest, straight_through
from qjax.finetune.lora import mapped
from qjax.finetune.parameters import Layout, layer_value
from qjax.matrix.quantized import QuantizedMatrix
from qjax.typing import Leaf, pytree, static

__all__ = ["Latent", "closed", "opened", "rounding_latents"]


@pytree
class Latent:
    """`W ≈ Uᵀ Z V` with Z `[padded_out, padded_in]` in the order and place of the codewords of `base`.

    Attributes:
      latent: Z, float32, in units of the weight.
      base: scales, transform, codebook, gains; its codes are not used.
      rounds: Z is rounded to the nearest codewords wherever it is used.
    """

    latent: Leaf
    base: QuantizedMatrix
    rounds: bool = static()

    def dequantize(self) -> Float[Array, "out in"]:
        """The dense matrix in the original basis; gradients reach Z as if it were not rounded."""
        z = self.latent
        if self.rounds:
            base = self.base
            codes = nearest(z, base.scaling, base.codebook)
            z = straight_through(z, base.scaling.from_codebook_units(base.codebook.dequantize(codes)))
        return self.base.dequantize(z)

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x."""
        return jnp.einsum("...i,oi->...o", x, self.dequantize().astype(x.dtype))


@jax.jit
def _started(base: QuantizedMatrix, weight: Array) -> Array:
    z = base.transform.weight(weight)
    return z if base.permutation is None else jnp.take(z, base.permutation.astype(jnp.int32), axis=1)


@jax.jit
def _rounded(latent: Array, base: QuantizedMatrix) -> Array:
    return base.codebook.pack(nearest(latent, base.scaling, base.codebook))


@jax.jit
def _codewords(base: QuantizedMatrix) -> Array:
    return base.codewords()


def opened(params: Any) -> Any:
    """Every quantised matrix by the values of its codewords, not rounded again: what has a gradient by code."""

    def change(name: str, weight: Any) -> Any:
        return Latent(_codewords(weight), weight, False) if isinstance(weight, QuantizedMatrix) else weight

    return mapped(params, change)


def rounding_latents(params: Any, original: Any) -> Any:
    """Every quantised matrix by the weights of the `original` parameters, rounded in every pass.

    Raises InputError for a codebook of vectors, whose search in every pass would take longer than all else.
    """
    dense: dict[str, Any] = {}
    mapped(original, lambda name, weight: dense.setdefault(name, weight))

    def change(name: str, weight: Any) -> Any:
        if not isinstance(weight, QuantizedMatrix):
            return weight
        if weight.codebook.tile != (1, 1):
            raise InputError(
                f"finetune=qat rounds in every step and needs a scalar codebook; {name} has "
                f"{weight.codebook.spec()['name']!r}: use codebook=half_integer, grid or lloyd_max, or finetune=pv"
            )
        return Latent(_started(weight, dense[name]), weight, True)

    return mapped(params, change)


def closed(params: Any, layout: Layout, tuned: Mapping[str, Any]) -> Any:
    """Ordinary quantised matrices again: the codes nearest to the tuned latents."""
    host = {name: value for name, value in tuned.items() if name.endswith("latent")}

    def change(name: str, weight: Any) -> Any:
        if not isinstance(weight, Latent):
            return weight
        found = layer_value(host, layout, f"{name}.latent")
        latent = weight.latent if found is None else np.asarray(found)
        whole: Any = weight.base
        return whole.replace(packed=_rounded(latent, weight.base))

    return mapped(params, change)
