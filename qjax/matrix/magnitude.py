"""Powers of two that bring a matrix or a Hessian into the middle of float32's range, where squares and sums fit.

A factor of two changes no digit, so what comes out is what came out before, wherever nothing overflowed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qjax.linalg.kronecker import Hessian

__all__ = ["exponent", "normalized", "scaled"]

_FAR = 40  # a sum of squares of values within 2^±40 neither overflows nor vanishes


def exponent(values: Any) -> int:
    """k with `max |values| / 2^k` in [1/2, 1), if that lies beyond ±40; else 0, as for zeros or what is not finite."""
    host = np.asarray(values)
    largest = max(abs(float(host.min())), abs(float(host.max())))
    if largest == 0 or not np.isfinite(largest):
        return 0
    found = int(np.frexp(largest)[1])
    return found if abs(found) > _FAR else 0


def scaled(values: Any, by: int) -> Any:
    """`values · 2^by`, on the host in the dtype of float32; as they are for 0."""
    if by == 0 or values is None:
        return values
    host = np.asarray(values)
    wide = host if host.dtype == np.float64 else host.astype(np.float32)
    return np.ldexp(wide, by).astype(np.float32)


def normalized(hessian: Hessian) -> Hessian:
    """The Hessian with each factor in the middle of the range: its scale has no meaning."""
    inner, out = exponent(np.diagonal(np.asarray(hessian.input))), 0
    if hessian.output is not None:
        out = exponent(np.diagonal(np.asarray(hessian.output)))
    if inner == out == 0:
        return hessian
    return dataclasses.replace(
        hessian,
        input=scaled(hessian.input, -inner),
        output=scaled(hessian.output, -out),
        cross=scaled(hessian.cross, -inner),
    )
