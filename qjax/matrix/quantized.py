"""A quantised weight matrix: packed codes, signs and scales, decoded only where it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax import codebooks
from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.errors import InputError
from qjax.incoherence.rotations import ROTATIONS, Rotation
from qjax.incoherence.transform import Transform
from qjax.matrix.operator import OPERATORS, checked_array, checked_format, checked_shape, leaves, part
from qjax.typing import HostOrDevice, Leaf, brief, pytree

__all__ = ["QuantizedMatrix", "row_obstacle"]

_FORMAT = 1
_SIDES = ("output_rotation", "input_rotation")


def _gained(x: Array, gain: Array | np.ndarray | None) -> Array:
    """x with its last axis multiplied by a gain, in the dtype of x."""
    return x if gain is None else x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@pytree
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

    def __repr__(self) -> str:
        (out, inner), book = self.shape, self.codebook
        name, bits = getattr(book, "name", type(book).__name__), getattr(book, "bits", "?")
        return f"QuantizedMatrix({out} × {inner}, {name} with {bits} bits, codes {brief(self.packed)})"

    def codewords(self) -> Float[Array, "padded_out padded_in"]:
        """The decoded values in units of the weight and in the order in which they were coded, float32."""
        return self.scaling.from_codebook_units(
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

    def rows(self, index: Int[HostOrDevice, "*batch"]) -> Float[Array, "*batch in"]:
        """Rows of the matrix, float32, decoded alone where the stream's rows end with its words; indices are clipped.

        Raises InputError where a row cannot be decoded without the others (`row_obstacle`).
        """
        if (why := row_obstacle(self)) is not None:
            raise InputError(f"rows of this matrix cannot be looked up: {why}")
        (out, inner), columns = self.shape, self.transform.padded[1]
        at = jnp.clip(jnp.asarray(index).reshape(-1), 0, out - 1)
        bits = round(self.codebook.bits * columns)
        if bits % 32:
            codes = self.codebook.unpack(self.packed, self.transform.padded)
            codes = jnp.take(codes, at, axis=0)
        else:
            words = jnp.take(self.packed.reshape(-1, bits // 32), at, axis=0)
            codes = self.codebook.unpack(words.reshape(-1), (at.size, columns))
        scaling = self.scaling
        if scaling.relative is not None and scaling.relative.shape[0] > 1:
            own = lambda x: None if x is None else jnp.take(x, at, axis=0)  # noqa: E731
            scaling = dataclasses.replace(scaling, relative=own(scaling.relative), zero=own(scaling.zero))
        values = self.rotated(scaling.from_codebook_units(self.codebook.dequantize(codes)))
        padded = (at.size, columns)
        w = dataclasses.replace(self.transform, shape=(at.size, inner), padded=padded).weight_inverse(values)
        w = w if self.output_gain is None else w * jnp.take(self.output_gain, at).astype(w.dtype).reshape(-1, 1)
        return _gained(w, self.input_gain).reshape(*index.shape, inner)

    def spec(self) -> dict[str, Any]:
        """Shape, padding, the rotations of both sides, whether inputs are rescaled, codebook, columns per scale."""
        return {
            "kind": "quantized",
            "format": _FORMAT,
            "shape": list(self.shape),
            **transform_spec(self.transform),
            "codebook": self.codebook.spec(),
            "scale_group": self.scaling.group,
        }


def row_obstacle(matrix: QuantizedMatrix) -> str | None:
    """The reason why rows of a matrix cannot be decoded one by one, with the remedy; None where they can."""
    if matrix.transform.output_rotation is not None:
        return (
            "its rows are mixed by a rotation of the outputs; use incoherence: none or {name: hadamard, side: input} "
            "in its rule"
        )
    if matrix.codebook.tile[0] > 1:
        name = matrix.codebook.spec()["name"]
        return f"codebook {name} codes {matrix.codebook.tile[0]} rows together; use codebook: grid in its rule"
    return None


def transform_spec(transform: Transform) -> dict[str, Any]:
    """The static part of an incoherence processing without its shape, as JSON values."""
    rotations = {side: getattr(transform, side) for side in _SIDES}
    return {
        "padded": list(transform.padded),
        **{side: None if rotation is None else rotation.spec() for side, rotation in rotations.items()},
        "rescale": transform.rescale is not None,
    }


@OPERATORS.register("quantized")
def _read(spec: Mapping[str, Any], arrays: Mapping[str, Leaf]) -> QuantizedMatrix:
    """The matrix of a spec. Raises InputError for arrays whose sizes are not those that the spec asks for."""
    checked_format(spec, _FORMAT)
    (out, inner), padded = checked_shape(spec["shape"]), checked_shape(spec["padded"], "the padded shape")
    codebook = _codebook(spec["codebook"], part(arrays, "codebook"))
    if padded[0] < out or padded[1] < inner or any(size % k for size, k in zip(padded, codebook.tile, strict=True)):
        raise InputError(f"padded from {[out, inner]} to {list(padded)} for tiles of {list(codebook.tile)}")
    words = -(-round(codebook.bits * padded[0] * padded[1]) // 32)
    packed = checked_array(arrays, "packed", (words,), np.unsignedinteger)
    if packed is None:
        raise InputError("a quantised matrix without its codes")
    rotations = [
        _rotation(spec[side], part(arrays, f"transform.{side}"), size)
        for side, size in zip(_SIDES, padded, strict=True)
    ]
    rescale = checked_array(arrays, "transform.rescale", (inner,))
    if (rescale is not None) is not spec["rescale"]:
        raise InputError(f"rescale is {spec['rescale']!r} and the array transform.rescale is {rescale!r}")
    return QuantizedMatrix(
        packed,
        _scaling(spec["scale_group"], part(arrays, "scaling"), padded),
        Transform(*rotations, rescale=rescale, shape=(out, inner), padded=padded),
        codebook,
        checked_array(arrays, "permutation", (padded[1],), np.unsignedinteger),
        checked_array(arrays, "output_gain", (out,)),
        checked_array(arrays, "input_gain", (inner,)),
    )


def _codebook(spec: Mapping[str, Any], tables: Mapping[str, Leaf]) -> Codebook:
    """The codebook of a spec, with tables that tuning changed."""
    codebook = codebooks.make(**spec)
    if not tables:
        return codebook
    own = leaves(codebook)
    for name in tables:
        if name not in own:
            raise InputError(f"codebook {spec['name']!r} has no table {name!r}")
        checked_array(tables, name, own[name].shape, np.generic)
    return dataclasses.replace(cast(Any, codebook), **tables)


def _rotation(spec: Mapping[str, Any] | None, arrays: Mapping[str, Leaf], size: int) -> Rotation | None:
    if spec is None:
        return None
    static = {name: value for name, value in spec.items() if name != "name"}
    rotation = ROTATIONS.make(spec["name"], **static, **arrays)
    if rotation.size != size:
        raise InputError(f"a rotation of {rotation.size} values for an axis of {size}")
    return rotation


def _scaling(group: Any, arrays: Mapping[str, Leaf], padded: tuple[int, int]) -> Scaling:
    if not (group is None or (type(group) is int and group > 0)):
        raise InputError(f"scale_group is {group!r}; it is a positive number of columns or null")
    groups = 1 if group is None else -(-padded[1] // group)
    unit = checked_array(arrays, "unit", ())
    relative = checked_array(arrays, "relative", (None, groups))
    zero = checked_array(arrays, "zero", (None, groups), np.unsignedinteger)
    if unit is None or any(part is not None and part.shape[0] not in (1, padded[0]) for part in (relative, zero)):
        raise InputError(f"scales of another matrix than one with {padded[0]} rows")
    return Scaling(unit, relative, zero, group)
