"""Codes of 1 to 8 bits in rows of little-endian words, as files of several tools hold them; NumPy on the host."""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer, UInt8, UInt32

__all__ = ["pack_rows", "unpack_rows", "words"]

_CODES_AT_ONCE = 1 << 22


def words(count: int, bits: int) -> int:
    """The number of 32-bit words of a row of `count` codes."""
    return -(-count * bits // 32)


def pack_rows(codes: Integer[np.ndarray, "m n"], bits: int) -> UInt32[np.ndarray, "m words"]:
    """Every row as a stream of its own: code i occupies bits `[i·bits, (i+1)·bits)`, zeros fill the last word."""
    rows, count = codes.shape
    found = np.zeros((rows, words(count, bits)), np.uint32)
    for part in _parts(rows, count):
        single = (codes[part].astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
        stream = np.zeros((len(single), found.shape[1] * 32), np.uint8)
        stream[:, : count * bits] = single.reshape(len(single), -1)
        found[part] = np.packbits(stream, axis=1, bitorder="little").view("<u4")
    return found


def unpack_rows(packed: UInt32[np.ndarray, "m words"], bits: int, count: int) -> UInt8[np.ndarray, "m n"]:
    """The inverse of `pack_rows`: the first `count` codes of every row."""
    found = np.empty((len(packed), count), np.uint8)
    for part in _parts(len(packed), count):
        stream = np.ascontiguousarray(packed[part].astype("<u4", copy=False)).view(np.uint8)
        single = np.unpackbits(stream, axis=1, count=count * bits, bitorder="little").reshape(-1, count, bits)
        found[part] = np.packbits(single, axis=2, bitorder="little")[..., 0]
    return found


def _parts(rows: int, count: int) -> list[slice]:
    """Rows a few million codes at a time: a code takes eight bytes and more on the way."""
    step = max(1, _CODES_AT_ONCE // max(count, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
