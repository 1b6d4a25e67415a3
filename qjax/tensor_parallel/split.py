"""A quantised matrix cut into equal parts by rows or columns of its rotated codes, without decoding or rounding.

The parts are quantised matrices of their own, without a transform: `Q = [Q₀; Q₁; …]` by rows, `[Q₀, Q₁, …]` by columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from qjax.codebooks.scaling import Scaling
from qjax.incoherence.rotations import SignedHadamard
from qjax.incoherence.transform import Transform
from qjax.matrix.quantized import QuantizedMatrix

__all__ = ["half_transforms", "part_size", "parts", "unit"]


def unit(matrix: QuantizedMatrix, axis: int) -> int:
    """The divisor of a part's size along `axis` (0 rows, 1 columns): whole tiles, whole groups."""
    tile = matrix.codebook.tile[axis]
    return math.lcm(tile, matrix.scaling.group) if axis == 1 and matrix.scaling.group else tile


def part_size(matrix: QuantizedMatrix, axis: int, count: int) -> int:
    """Rows or columns of each of `count` equal parts; the last ones may have to be filled up."""
    step = unit(matrix, axis)
    return -(-matrix.transform.padded[axis] // (count * step)) * step


@functools.partial(jax.jit, static_argnames="shape")
def _codes(packed: Array, codebook: Any, shape: tuple[int, int]) -> Array:
    return codebook.unpack(packed, shape)


@jax.jit
def _stream(codes: Array, codebook: Any) -> Array:
    return codebook.pack(codes)


def _cut(values: np.ndarray, axis: int, size: int, index: int) -> np.ndarray:
    """Entries `index · size …` along an axis, zeros where there are none left."""
    piece = np.take(values, np.arange(index * size, min((index + 1) * size, values.shape[axis])), axis=axis)
    widths = [(0, size - piece.shape[axis] if i == axis else 0) for i in range(values.ndim)]
    return np.pad(piece, widths)


def _scaling(scaling: Scaling, axis: int, size: int, index: int) -> Scaling:
    def cut(values: Any) -> Any:
        if values is None or (axis == 0 and values.shape[0] == 1) or (axis == 1 and scaling.group is None):
            return values
        step = size if axis == 0 else size // (scaling.group or 1)
        return _cut(np.asarray(values), axis, step, index)

    return dataclasses.replace(scaling, relative=cut(scaling.relative), zero=cut(scaling.zero))


def parts(matrix: QuantizedMatrix, axis: int, count: int) -> list[QuantizedMatrix]:
    """`count` matrices of equal shape that make up Q: row blocks for `axis` 0, column blocks for 1.

    Where Q does not divide, parts are filled up with code 0; what multiplies or reads those rows and columns is the
    caller's (zeros in, cut off out).
    """
    size, padded = part_size(matrix, axis, count), matrix.transform.padded
    shape = (size, padded[1]) if axis == 0 else (padded[0], size)
    codes = np.asarray(_codes(matrix.packed, matrix.codebook, padded))
    whole = Transform(None, None, None, shape, shape)
    found = []
    for index in range(count):
        own = _cut(codes, axis, size // matrix.codebook.tile[axis], index)
        stream = np.asarray(_stream(own, matrix.codebook))
        found.append(QuantizedMatrix(stream, _scaling(matrix.scaling, axis, size, index), whole, matrix.codebook))
    return found


def _signs(rotation: SignedHadamard, size: int, index: int) -> SignedHadamard:
    """The signs and blocks of one part of an axis."""
    words = np.asarray(rotation.words, "<u4")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[index * size : (index + 1) * size]
    bits = np.pad(bits, (0, -size % 32))
    return SignedHadamard(np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32), size, rotation.block)


def half_transforms(matrix: QuantizedMatrix, axis: int, count: int) -> list[Transform] | None:
    """The transform of one side (`axis` 0: of the outputs, 1: of the inputs) of every part by itself.

    None where it mixes parts: with a full Hadamard or another transform of the whole axis, with padding, or where a
    part does not hold whole tiles and blocks.
    """
    transform = matrix.transform
    rotation = transform.output_rotation if axis == 0 else transform.input_rotation
    size, padded = transform.shape[axis], transform.padded[axis]
    if size != padded or size % count or (size // count) % unit(matrix, axis):
        return None
    own = size // count
    if rotation is not None and not (isinstance(rotation, SignedHadamard) and own % rotation.block == 0):
        return None
    found = []
    for index in range(count):
        turned = None if rotation is None else _signs(rotation, own, index)
        scale = None
        if axis == 1 and transform.rescale is not None:
            scale = np.asarray(transform.rescale)[index * own : (index + 1) * own]
        shape = (own, transform.shape[1]) if axis == 0 else (transform.shape[0], own)
        pair = (turned, None) if axis == 0 else (None, turned)
        found.append(Transform(*pair, rescale=scale, shape=shape, padded=shape))
    return found
