"""Matrices of integers with scales and zeros by group of inputs, in the layouts of three tools.

All stand for `w = (q − z) · s`: codes q `[out, in]` of b bits, scales s and zeros z `[out, groups]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Integer, UInt8

from qjax.errors import ModelFileError
from qjax.models.checkpoints.packed.bits import pack_rows, unpack_rows, words

__all__ = ["Integers", "awq", "compressed_tensors", "from_awq", "from_compressed_tensors", "from_gptq", "gptq"]

_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight outputs in a word, the nibble of each

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Integers:
    """A matrix `[out, in]` of integer codes.

    Attributes:
      codes: q.
      bits: of a code, 1 to 8.
      scale: s `[out, groups]`.
      zero: z `[out, groups]`; None is `2^(bits − 1)` everywhere, a symmetric grid.
      group_of: `[in]` the group of every input; None where they follow each other in equal parts.
    """

    codes: UInt8[np.ndarray, "out in"]
    bits: int
    scale: Float[np.ndarray, "out groups"]
    zero: Integer[np.ndarray, "out groups"] | None = None
    group_of: Integer[np.ndarray, " in"] | None = None

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return -(-self.codes.shape[1] // self.scale.shape[1])

    @property
    def zeros(self) -> Integer[np.ndarray, "out groups"]:
        """z, whether stored or not."""
        return np.full(self.scale.shape, 2 ** (self.bits - 1), np.int32) if self.zero is None else self.zero

    def groups(self) -> Integer[np.ndarray, " in"]:
        """The group of every input."""
        if self.group_of is not None:
            return self.group_of
        return np.arange(self.codes.shape[1], dtype=np.int32) // self.group_size

    def values(self) -> Float[np.ndarray, "out in"]:
        """`(q − z) · s`, float32."""
        group = self.groups()
        centred = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[:, group]
        return centred * self.scale.astype(np.float32)[:, group]


def compressed_tensors(matrix: Integers) -> dict[str, np.ndarray]:
    """The arrays of `pack-quantized`: every row a stream of its own, zeros streamed down the rows of each group."""
    found = {
        "weight_packed": pack_rows(matrix.codes, matrix.bits).view(np.int32),
        "weight_scale": matrix.scale,
        "weight_shape": np.asarray(matrix.codes.shape, np.int64),
    }
    if matrix.zero is not None:
        found["weight_zero_point"] = np.ascontiguousarray(pack_rows(matrix.zero.T, matrix.bits).T).view(np.int32)
    if matrix.group_of is not None:
        found["weight_g_idx"] = matrix.group_of.astype(np.int32)
    return found


def from_compressed_tensors(arrays: Arrays, bits: int, name: str, dense: bool | None = None) -> Integers:
    """The inverse of `compressed_tensors`.

    Widths that do not divide 32 have two layouts: a dense stream, and ⌊32/bits⌋ codes in every word, as compressed-
    tensors wrote them before 0.18. The number of words tells them apart; where both have as many, `dense` does.

    Raises ModelFileError for arrays whose sizes are not those of the shape, and for a layout that nothing tells.
    """
    rows, count = (int(size) for size in arrays["weight_shape"].reshape(-1))
    packed, scale = arrays["weight_packed"], _columns(arrays["weight_scale"])
    streamed, whole = words(count, bits), -(-count // (32 // bits))
    if packed.ndim != 2 or packed.shape[0] != rows or packed.shape[1] not in (streamed, whole):
        raise ModelFileError(
            f"{name}.weight_packed has shape {list(packed.shape)}; {rows} × {count} codes of {bits} bits take "
            f"[{rows}, {streamed}]" + (f", or [{rows}, {whole}] before 0.18" if whole != streamed else "")
        )
    if streamed == whole and 32 % bits and count > 32 // bits and dense is None:
        raise ModelFileError(
            f"{name}.weight_packed: {count} codes of {bits} bits take as many words in compressed-tensors' layout of "
            '0.18 as in the one before; say which wrote the file: "version" in quantization_config'
        )
    if packed.shape[1] != whole or (streamed == whole and dense is not False):
        codes = unpack_rows(packed.view(np.uint32), bits, count)
    else:
        codes = _whole_codes(packed.view(np.uint32), bits)[:, :count]
    zero = arrays.get("weight_zero_point")
    if zero is not None:
        groups, height = scale.shape[1], words(rows, bits)
        if zero.shape == (height, groups):
            zero = unpack_rows(np.ascontiguousarray(zero.T).view(np.uint32), bits, rows).T
        elif zero.shape == (-(-rows // (32 // bits)), groups):
            zero = _whole_codes(np.ascontiguousarray(zero.T).view(np.uint32), bits)[:, :rows].T
        else:
            raise ModelFileError(
                f"{name}.weight_zero_point has shape {list(zero.shape)}; [{height}, {groups}] is needed"
            )
    group_of = arrays.get("weight_g_idx")
    return _checked(Integers(codes, bits, scale, zero, None if group_of is None else _group_of(group_of)), name)


def gptq(matrix: Integers, version: int = 2) -> dict[str, np.ndarray]:
    """The arrays of GPTQ's layout: streams down the inputs; version 1 stores z − 1, version 2 z.

    Raises ModelFileError for sizes that 32 does not divide, and for a zero of 0 in version 1, to whose words readers
    add 1.
    """
    rows, count = matrix.codes.shape
    if rows % 32 or count % 32:
        raise ModelFileError(f"a matrix of {rows} × {count}: GPTQ's layout needs multiples of 32")
    zeros = matrix.zeros
    if version == 1:
        if not (zeros > 0).all():
            raise ModelFileError("a zero of 0 cannot be stored in GPTQ's version 1: use version 2 (gptq_v2)")
        zeros = zeros - 1
    return {
        "qweight": np.ascontiguousarray(pack_rows(matrix.codes, matrix.bits).T).view(np.int32),
        "qzeros": pack_rows(np.ascontiguousarray(zeros.T), matrix.bits).view(np.int32),
        "scales": np.ascontiguousarray(matrix.scale.T).astype(np.float16),
        "g_idx": matrix.groups().astype(np.int32),
    }


def from_gptq(arrays: Arrays, bits: int, name: str, version: int = 2) -> Integers:
    """The inverse of `gptq`. Raises ModelFileError for sizes that contradict each other."""
    qweight, qzeros, scales = arrays["qweight"], arrays["qzeros"], arrays["scales"]
    groups, rows = scales.shape
    count = qweight.shape[0] * 32 // bits
    if qweight.shape != (words(count, bits), rows) or qzeros.shape != (groups, words(rows, bits)):
        raise ModelFileError(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are "
            f"not those of one matrix with codes of {bits} bits"
        )
    codes = unpack_rows(np.ascontiguousarray(qweight.T).view(np.uint32), bits, count)
    zeros = unpack_rows(qzeros.view(np.uint32), bits, rows).T.astype(np.int32) + (version == 1)
    order = arrays.get("g_idx")
    return _checked(
        Integers(codes, bits, np.ascontiguousarray(scales.T), zeros, None if order is None else _group_of(order)), name
    )


def awq(matrix: Integers) -> dict[str, np.ndarray]:
    """The arrays of AWQ's GEMM layout: eight outputs in a word, in an order of their own.

    Raises ModelFileError for other than 4 bits, for outputs that 8 does not divide, and for inputs out of order.
    """
    rows, count = matrix.codes.shape
    if matrix.bits != 4 or rows % 8 or matrix.group_of is not None:
        raise ModelFileError(
            f"a matrix of {rows} × {count} with {matrix.bits} bits: AWQ's layout has 4 bits, multiples of 8 outputs, "
            "and groups of neighbouring inputs"
        )
    return {
        "qweight": _awq_words(matrix.codes.T),
        "qzeros": _awq_words(matrix.zeros.T),
        "scales": np.ascontiguousarray(matrix.scale.T).astype(np.float16),
    }


def from_awq(arrays: Arrays, bits: int, name: str) -> Integers:
    """The inverse of `awq`. Raises ModelFileError for other than 4 bits and sizes that contradict each other."""
    qweight, qzeros, scales = arrays["qweight"], arrays["qzeros"], arrays["scales"]
    groups, rows = scales.shape
    if bits != 4 or qweight.ndim != 2 or qweight.shape[1] * 8 != rows or qzeros.shape != (groups, rows // 8):
        raise ModelFileError(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are "
            f"not those of one AWQ matrix (4 bits, here {bits})"
        )
    codes, zeros = np.ascontiguousarray(_awq_codes(qweight).T), _awq_codes(qzeros).T
    return _checked(Integers(codes, bits, np.ascontiguousarray(scales.T), zeros.astype(np.int32)), name)


def _awq_words(codes: np.ndarray) -> np.ndarray:
    """`[rows, columns]` codes of 4 bits to `[rows, columns/8]` words."""
    eight = codes.astype(np.uint32).reshape(len(codes), -1, 8) << (4 * np.asarray(_AWQ_NIBBLES, np.uint32))
    return np.bitwise_or.reduce(eight, axis=2).astype(np.uint32).view(np.int32)


def _awq_codes(packed: np.ndarray) -> np.ndarray:
    shifts = 4 * np.asarray(_AWQ_NIBBLES, np.uint32)
    return ((packed.view(np.uint32)[..., None] >> shifts) & np.uint32(15)).astype(np.uint8).reshape(len(packed), -1)


def _whole_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of which every word holds as many whole ones as fit."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    single = (packed[..., None] >> shifts) & np.uint32(2**bits - 1)
    return single.astype(np.uint8).reshape(len(packed), -1)


def _columns(scale: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, 1) if scale.ndim < 2 else scale


def _group_of(order: np.ndarray) -> np.ndarray | None:
    """Indices of groups; None where there are none to speak of (a file may hold −1 everywhere)."""
    return None if (order < 0).all() else order.astype(np.int32)


def _checked(matrix: Integers, name: str) -> Integers:
    """Raises ModelFileError unless scales are those of the matrix' rows and of groups that divide its inputs."""
    rows, count = matrix.codes.shape
    height, groups = matrix.scale.shape
    if height != rows or groups < 1 or (matrix.group_of is None and count % groups):
        raise ModelFileError(
            f"{name}: scales for {height} rows in {groups} groups, and a matrix of {rows} × {count}; groups are equal "
            "parts of the inputs"
        )
    order = matrix.group_of
    if order is not None and (order.shape != (count,) or (order < 0).any() or (order >= groups).any()):
        raise ModelFileError(f"{name}: the groups of its inputs are not {count} numbers from 0 to {groups - 1}")
    # A dense index is no index.
    if order is not None and np.array_equal(order, np.arange(count) // -(-count // groups)):
        return dataclasses.replace(matrix, group_of=None)
    return matrix
