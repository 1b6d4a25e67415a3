"""Operators as matrices of integers with scales and zeros, where they are exactly that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.codebooks.scalar import UniformCodebook
from qjax.errors import InputError
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.checkpoints.packed.integers import Integers

__all__ = ["integers", "reason"]


def reason(operator: Any) -> str | None:
    """Why an operator is no matrix of integers, with the settings to change; None where it is one."""
    if not isinstance(operator, QuantizedMatrix):
        return f"it is a {type(operator).__name__}, no matrix of codes with scales (save before tuning adapters)"
    transform, book = operator.transform, operator.codebook
    if transform.input_rotation is not None or transform.output_rotation is not None or transform.rescale is not None:
        return "its codes are those of the rotated or rescaled matrix: quantise with incoherence=none"
    if not isinstance(book, UniformCodebook):
        return f"codebook={getattr(book, 'name', book)} is no grid of equal steps: use codebook=grid or half_integer"
    if (book.first != 0.0 and book.bits > 7) or book.bits > 8:
        return f"its codes take {book.bits} bits, and one more to be odd integers: use codebook=grid"
    if operator.output_gain is not None or operator.input_gain is not None:
        return "tuning gave it gains for its inputs and outputs: use a model that was not tuned with finetune=e2e"
    return None


def integers(operator: QuantizedMatrix, name: str) -> Integers:
    """The integers of a matrix that has them: `(q − z) · s` is `dequantize()` to the bit.

    A `grid` keeps its codes; a `half_integer` (or `quip_grid`) of b bits becomes the odd ones of b + 1 bits around
    their middle, with half the scale. Columns that were coded in another order go back, each with its group.

    Raises InputError for an operator that is something else, with the reason.
    """
    if (why := reason(operator)) is not None:
        raise InputError(f"{name} cannot be stored as integers: {why}")
    book: Any = operator.codebook
    rows, columns = operator.shape
    codes = np.asarray(book.unpack(jnp.asarray(operator.packed), operator.transform.padded))[:rows, :columns]
    scale, zero, group = _scales(operator)
    order = None if operator.permutation is None else np.asarray(operator.permutation)
    group_of = None
    if order is not None:
        place = np.argsort(order)
        codes = codes[:, place]
        group_of = None if group is None else (place // group).astype(np.int32)
    if book.first == 0.0:
        zero = np.zeros_like(scale, np.int32) if zero is None else zero.astype(np.int32)
        middle = 2 ** (book.bits - 1)
        return Integers(codes, book.bits, scale, None if (zero == middle).all() else zero, group_of)
    return Integers((2 * codes + 1).astype(np.uint8), book.bits + 1, scale / np.float32(2), None, group_of)


def _scales(operator: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """(scale, zero, columns of a group): `[out, groups]`, as float32 and as they are stored."""
    scaling, (rows, columns) = operator.scaling, operator.shape
    group = scaling.group if scaling.group is not None and scaling.group < columns else None
    starts = np.arange(0, columns, columns if group is None else group, dtype=np.int32)
    scale, zero = jax.jit(lambda scaling: scaling.at(jnp.asarray(starts), jnp.float32))(scaling)
    whole = lambda x: np.broadcast_to(np.asarray(x), (len(x) if len(x) > 1 else rows, len(starts)))[:rows]  # noqa: E731
    return np.ascontiguousarray(whole(scale)), None if scaling.zero is None else whole(zero), group
