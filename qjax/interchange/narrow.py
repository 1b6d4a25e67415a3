"""Dense arrays in the smallest floating type that holds every value: those of a bfloat16 checkpoint in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

__all__ = ["narrowest", "widened"]

_NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_CHUNK = 1 << 22  # values that are compared at a time


def narrowest(array: np.ndarray) -> np.ndarray:
    """A float32 array as bfloat16 or float16 where that changes no bit of any value; others as they are."""
    if array.dtype != np.float32:
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    for dtype in _NARROW:
        found = np.empty(flat.shape, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if all(_same(flat, found, start) for start in range(0, flat.size, _CHUNK)):
                return found.reshape(array.shape)
    return array


def _same(flat: np.ndarray, found: np.ndarray, start: int) -> bool:
    """Fill a chunk; whether it is the same to the bit."""
    own = flat[start : start + _CHUNK]
    part = found[start : start + _CHUNK] = own.astype(found.dtype)
    return np.array_equal(part.astype(np.float32).view(np.uint32), own.view(np.uint32))


def widened(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays, those that `dtypes` names in the type that they had. Raises ValueError for one but float32."""
    if other := set(dtypes.values()) - {"float32"}:
        raise ValueError(f"arrays were stored narrowed from {sorted(other)}")
    return {name: array.astype(dtypes[name]) if name in dtypes else array for name, array in arrays.items()}
