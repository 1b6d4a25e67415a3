"""Dense arrays as files hold them: in the smallest form that keeps every bit of every value.

A float32 array whose values are those of a bfloat16 or float16 checkpoint is stored in that type, and a matrix that was
dequantised from Q8_0 (`d q`, d in float16 for 32 neighbours, q in int8) as these codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

__all__ = ["narrowest", "narrowest_bytes", "widened"]

_NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_CHUNK = 1 << 22  # values that are compared at a time
_BLOCK, _LARGEST = 32, 127  # of Q8_0; the largest value of a block has this code
_CODES, _SCALES = "~codes", "~scales"


def narrowest(array: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of an array by what their names end with: itself, another type of it, or codes and scales."""
    if array.dtype != np.float32:
        return {"": array}
    flat = np.ascontiguousarray(array).reshape(-1)
    for dtype in _NARROW:
        found = np.empty(flat.shape, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if all(_same(flat, found, start) for start in range(0, flat.size, _CHUNK)):
                return {"": found.reshape(array.shape)}
    if array.ndim == 2 and array.shape[1] % _BLOCK == 0 and (parts := _blocks(flat)) is not None:
        rows = array.shape[0]
        return {_CODES: parts[0].reshape(array.shape), _SCALES: parts[1].reshape(rows, -1)}
    return {"": array}


def narrowest_bytes(array: np.ndarray) -> int:
    """The bytes of the parts."""
    return sum(part.nbytes for part in narrowest(array).values())


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """To the bit: zeros have signs."""
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


def _same(flat: np.ndarray, found: np.ndarray, start: int) -> bool:
    """Fill a chunk; whether it is the same."""
    own = flat[start : start + _CHUNK]
    part = found[start : start + _CHUNK] = own.astype(found.dtype)
    return _equal(part.astype(np.float32), own)


def _blocks(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes int8 `[blocks, 32]` and scales float16 `[blocks]`; None where a value is another."""
    blocks = flat.reshape(-1, _BLOCK)
    codes, scales = np.empty(blocks.shape, np.int8), np.empty(len(blocks), np.float16)
    for start in range(0, len(blocks), _CHUNK // _BLOCK):
        own = blocks[start : start + _CHUNK // _BLOCK]
        with np.errstate(all="ignore"):
            scale = (np.abs(own).max(axis=1) / _LARGEST).astype(np.float16)
            ratio = np.rint(own / np.where(scale == 0, 1, scale).astype(np.float32)[:, None])
            code = np.clip(np.nan_to_num(ratio), -_LARGEST - 1, _LARGEST).astype(np.int8)
            if not _equal(_product(code, scale), own):
                return None
        codes[start : start + len(own)], scales[start : start + len(own)] = code, scale
    return codes, scales


def _product(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`d q` `[blocks, 32]`, which is exact in float32."""
    return codes.astype(np.float32) * scales.astype(np.float32)[:, None]


def widened(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of parts as they are in memory, those that `dtypes` names in its type.

    Raises ValueError for another type than float32 or parts that do not belong together, KeyError for missing ones.
    """
    if other := set(dtypes.values()) - {"float32"}:
        raise ValueError(f"arrays were stored narrowed from {sorted(other)}")
    result = dict(arrays)
    for name in dtypes:
        if name in result:
            result[name] = result[name].astype(np.float32)
            continue
        codes, scales = result.pop(f"{name}{_CODES}"), result.pop(f"{name}{_SCALES}")
        if codes.ndim != 2 or codes.size != scales.size * _BLOCK:
            raise ValueError(f"{name} has {codes.size} codes and {scales.size} scales")
        result[name] = _product(codes.reshape(-1, _BLOCK), scales.reshape(-1)).reshape(codes.shape)
    return result
