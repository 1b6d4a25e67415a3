"""Checks of a matrix and its Hessian before anything is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from qjax.errors import InputError, NumericsError
from qjax.linalg.damping import check_hessian
from qjax.linalg.kronecker import Hessian

__all__ = ["_first_not_finite", "_validate"]


def _first_not_finite(matrix: np.ndarray, rows: int = 256) -> tuple[int, int] | None:
    """The index of the first value that is not finite, looked for some rows at a time."""
    for start in range(0, len(matrix), rows):
        finite = np.isfinite(matrix[start : start + rows])
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            return start + int(row), int(column)
    return None


def _validate(weight: Any, hessian: Hessian, name: str) -> None:
    shape = np.shape(weight)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"layer {name}: a weight matrix has shape [out, in] with both positive; found {shape}")
    if np.shape(hessian.input) != (shape[1], shape[1]):
        raise InputError(
            f"layer {name}: the Hessian has shape {np.shape(hessian.input)} but the weight {shape} needs "
            f"({shape[1]}, {shape[1]}); it was collected for another layer or model"
        )
    if hessian.output is not None and np.shape(hessian.output) != (shape[0], shape[0]):
        raise InputError(
            f"layer {name}: the output Hessian has shape {np.shape(hessian.output)} but the weight "
            f"{shape} needs ({shape[0]}, {shape[0]})"
        )
    if hessian.cross is not None and np.shape(hessian.cross) != np.shape(hessian.input):
        raise InputError(
            f"layer {name}: the cross moment has shape {np.shape(hessian.cross)}, the Hessian "
            f"{np.shape(hessian.input)}; they must be the same"
        )
    arrays = {"weight": weight, "input Hessian": hessian.input, "output Hessian": hessian.output}
    for what, array in {**arrays, "cross moment": hessian.cross}.items():
        if array is None:
            continue
        host = np.asarray(array)
        if (where := _first_not_finite(host)) is not None:
            raise NumericsError(
                f"layer {name}: the {what} holds {host[where]} at {where}; "
                "check the checkpoint, or the calibration data and its dtype"
            )
    for what, factor in (("input", hessian.input), ("output", hessian.output)):
        if factor is not None:
            check_hessian(np.asarray(factor), f"layer {name} ({what} factor)")
