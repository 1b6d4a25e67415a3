"""Columns of a matrix: how many are rounded together, in which order, and their codes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling
from qjax.errors import InputError

__all__ = ["column_block", "compact", "encode_columns", "place", "reorder"]


def column_block(codebook: Codebook, block: int | None, columns: int) -> int:
    """The number of columns that are rounded together: `block`, or the width of the codebook's tile.

    Raises InputError when the block is not a multiple of the tile's width or does not divide the number of columns.
    """
    width = codebook.tile[1]
    block = width if block is None else block
    if block < 1 or block % width:
        raise InputError(f"rounding.block is {block}; it must be a multiple of the codebook's tile width {width}")
    if columns % block:
        raise InputError(f"rounding.block is {block} and the matrix has {columns} columns; the block must divide them")
    return block


def encode_columns(
    target: Float[Array, "m g"], codebook: Codebook, scale: Array, zero: Array
) -> tuple[Float[Array, "m g"], Array]:
    """Nearest codewords of some columns under their (scale, zero): (values, codes)."""
    codes = codebook.quantize(target / scale + zero)
    return (codebook.dequantize(codes).astype(target.dtype) - zero) * scale, codes


def reorder(
    weight: Float[Array, "m n"], hessian: Float[Array, "n n"], order: Array
) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """(W, H) with the columns of W, and the rows and columns of H, in `order`."""
    return jnp.take(weight, order, axis=1), jnp.take(jnp.take(hessian, order, axis=0), order, axis=1)


def place(order: Array | None, columns: int, codebook: Codebook, scaling: Scaling) -> tuple[Array, Array | None]:
    """(column index for scales, permutation to store) of codes made in `order` (None: natural).

    Codes of a tile one column wide are put back into the natural order afterwards, so nothing is stored; wider tiles
    keep their order. Raises InputError for wide tiles with scales per column group, which would need both
    orders at once.
    """
    if order is None:
        return jnp.arange(columns), None
    if codebook.tile[1] == 1:
        return order, None
    if scaling.group is not None:
        raise InputError(
            f"scale.granularity=group cannot be combined with a column order for the {codebook.tile} tiles "
            "of this codebook; "
            "use rounding.order=natural or one scale per row or matrix"
        )
    return order, compact(order)


def compact(order: Array) -> Array:
    """A permutation in the smallest unsigned integers that it is stored in, uint16 or uint32."""
    return order.astype(jnp.uint16 if order.shape[0] <= 2**16 else jnp.uint32)
