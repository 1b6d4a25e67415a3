"""Matrices of 4-bit and 8-bit floats with block scales, as compressed-tensors stores them."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from qjax.errors import ModelFileError

__all__ = ["E2M1", "e2m1_values", "from_mxfp4", "from_nvfp4"]

E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Magnitudes of the codes 0 to 7; the fourth bit is the sign."""

Arrays = Mapping[str, np.ndarray]


def e2m1_values(packed: UInt8[np.ndarray, "m half"]) -> Float[np.ndarray, "m n"]:
    """Two codes a byte, the first in the low half."""
    codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)
    return np.concatenate([E2M1, -E2M1])[codes]


def from_nvfp4(arrays: Arrays, name: str) -> Float[np.ndarray, "m n"]:
    """`e2m1 · scale / global scale`: an E4M3 scale for 16 inputs, one float32 for the matrix.

    Raises ModelFileError for scales of another shape.
    """
    packed, scale = arrays["weight_packed"], arrays["weight_scale"]
    _blocks(packed, scale, 16, name)
    whole = np.float32(np.asarray(arrays["weight_global_scale"], np.float32).reshape(-1)[0])
    scale = scale.view(ml_dtypes.float8_e4m3fn) if scale.dtype == np.uint8 else scale
    return e2m1_values(packed) * np.repeat(scale.astype(np.float32) / whole, 16, axis=1)


def from_mxfp4(arrays: Arrays, name: str) -> Float[np.ndarray, "m n"]:
    """`e2m1 · 2^(scale − 127)`: a power of two for 32 inputs. Raises ModelFileError for scales of another shape."""
    packed, scale = arrays["weight_packed"], arrays["weight_scale"]
    _blocks(packed, scale, 32, name)
    exponent = scale.view(np.uint8).astype(np.int32) - 127
    return np.ldexp(e2m1_values(packed), np.repeat(exponent, 32, axis=1)).astype(np.float32)


def _blocks(packed: np.ndarray, scale: np.ndarray, size: int, name: str) -> None:
    if packed.ndim != 2 or scale.shape != (packed.shape[0], packed.shape[1] * 2 // size):
        raise ModelFileError(
            f"{name}.weight_scale has shape {list(scale.shape)} and weight_packed {list(packed.shape)}; there is a "
            f"scale for every {size} inputs"
        )
