"""A sum of operators: LoRA is a quantised matrix and a low-rank one, SpQR a quantised matrix and sparse outliers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.matrix.operator import OPERATORS, checked_format, checked_shape, make, part
from qjax.typing import Leaf, pytree

__all__ = ["Sum"]

_FORMAT = 1


@pytree
class Sum:
    """`W = W₀ + W₁ + …`.

    Attributes:
      terms: one operator or more, all of the shape of W.
    """

    terms: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0].shape

    @property
    def stored_bits(self) -> int:
        """Bits of all terms."""
        return sum(term.stored_bits for term in self.terms)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all terms together."""
        return sum(term.bits_per_weight for term in self.terms)

    def dequantize(self) -> Float[Array, "out in"]:
        """The sum of the dense terms, float32."""
        return functools.reduce(operator.add, (term.dequantize() for term in self.terms))

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`Σ x Wᵢᵀ` in the dtype of x."""
        return functools.reduce(operator.add, (term.matmul(x) for term in self.terms))

    def spec(self) -> dict[str, Any]:
        """The shape, and the specs of the terms."""
        terms = [term.spec() for term in self.terms]
        return {"kind": "sum", "format": _FORMAT, "shape": list(self.shape), "terms": terms}


@OPERATORS.register("sum")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> Sum:
    checked_format(spec, _FORMAT)
    shape = checked_shape(spec["shape"])
    terms = tuple(make(own, part(arrays, f"terms.{index}")) for index, own in enumerate(spec["terms"]))
    if not terms or any(tuple(term.shape) != shape for term in terms):
        raise InputError(f"a sum of shape {list(shape)} with terms of {[list(term.shape) for term in terms]}")
    return Sum(terms)
