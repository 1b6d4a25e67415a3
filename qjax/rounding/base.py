"""The rounding contract and what every rounding algorithm shares."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import Scaling, identity
from qjax.errors import InputError
from qjax.linalg.kronecker import Hessian
from qjax.registry import Registry

__all__ = ["ROUNDINGS", "Rounded", "Rounding", "column_block", "decode", "encode_columns", "finish"]


@struct.dataclass
class Rounded:
    """A matrix rounded to a codebook.

    Attributes:
      values: `[out, in]` the rounded matrix, in the units and column order of the weight.
      codes: the codebook's codes, of the columns in the order of `permutation`.
      scaling: the scales and zeros used.
      permutation: column order of the codes (`weight[:, permutation]` was coded), or None for the natural order.
      damping: multiple of the mean diagonal that was added to H (0 when the algorithm uses no Hessian).
      ok: False when no damping up to the cap made H factorisable, or a value is not finite.
      start: `[out, in]` the values before the coordinate-descent passes, or None without passes.
      output_damping: as `damping`, of H_out; None for roundings that do not use it.
    """

    values: Float[Array, "out in"]
    codes: Shaped[Array, "..."]
    scaling: Scaling
    permutation: Shaped[Array, " in"] | None
    damping: Float[Array, ""]
    ok: Array
    start: Float[Array, "out in"] | None = None
    output_damping: Float[Array, ""] | None = None


@runtime_checkable
class Rounding(Protocol):
    """A frozen, hashable algorithm: `rounding(weight, hessian, codebook, ...) -> Rounded`; pure and traceable.

    Without `scaling` the weight is in the codebook's own units. `damping` is relative to the mean diagonal of H.
    `key` is needed by randomised algorithms only.
    """

    def __call__(
        self,
        weight: Float[Array, "out in"],
        hessian: Hessian,
        codebook: Codebook,
        *,
        scaling: Scaling | None = None,
        damping: Float[Array, ""] | float = 0.01,
        key: Array | None = None,
    ) -> Rounded:
        """Round `weight` [out, in] (dimensions divisible by the codebook's tile)."""
        ...

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this algorithm again."""
        ...


ROUNDINGS: Registry[Rounding] = Registry("rounding")


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


def check_shapes(weight: Array, hessian: Hessian, codebook: Codebook) -> None:
    """Raise InputError unless the weight is [out, in], H is [in, in] and tiles divide the matrix (static checks)."""
    if weight.ndim != 2:
        raise InputError(f"a weight matrix has shape [out, in]; found shape {tuple(weight.shape)}")
    out, columns = weight.shape
    if hessian.input.shape != (columns, columns):
        raise InputError(
            f"the Hessian has shape {tuple(hessian.input.shape)} and the weight {tuple(weight.shape)}; "
            f"the input Hessian of this weight is [{columns}, {columns}]"
        )
    if hessian.output is not None and hessian.output.shape != (out, out):
        raise InputError(
            f"the output Hessian has shape {tuple(hessian.output.shape)} and the weight {tuple(weight.shape)}; "
            f"that of this weight is [{out}, {out}]"
        )
    rows, width = codebook.tile
    if out % rows or columns % width:
        raise InputError(
            f"a matrix of shape ({out}, {columns}) is not made of whole {rows}×{width} tiles; "
            "pad it (qjax.quantize_matrix does) or choose another codebook"
        )


def encode_columns(
    target: Float[Array, "m g"], codebook: Codebook, scale: Array, zero: Array
) -> tuple[Float[Array, "m g"], Array]:
    """Nearest codewords of some columns under their (scale, zero): (values, codes)."""
    codes = codebook.quantize(target / scale + zero)
    return (codebook.dequantize(codes).astype(target.dtype) - zero) * scale, codes


def decode(codes: Array, codebook: Codebook, scaling: Scaling, dtype: DTypeLike) -> Float[Array, "m n"]:
    """The values of all codes of a matrix."""
    return scaling.denormalize(codebook.dequantize(codes).astype(dtype))


def finish(
    codes: Array,
    codebook: Codebook,
    scaling: Scaling | None,
    dtype: DTypeLike,
    permutation: Array | None = None,
    damping: Array | float = 0.0,
    ok: Array | bool = True,
    start: Array | None = None,
) -> Rounded:
    """Assemble the result; `values` is exactly what a decoder will see, not a running difference.

    `start` are the codes before the coordinate-descent passes, if there were any.
    """
    scaling = identity() if scaling is None else scaling

    def seen(codes: Array) -> Array:
        values = decode(codes, codebook, scaling, dtype)
        return values if permutation is None else jnp.take(values, jnp.argsort(permutation), axis=1)

    values = seen(codes)
    ok = jnp.asarray(ok) & jnp.all(jnp.isfinite(values))
    before = None if start is None else seen(start)
    return Rounded(values, codes, scaling, permutation, jnp.asarray(damping, dtype), ok, before)


def spec_of(name: str, algorithm: Any) -> dict[str, Any]:
    """`{"name": name, **fields}` of a frozen dataclass."""
    return {"name": name, **dataclasses.asdict(algorithm)}


def require_key(key: Array | None, what: str) -> Array:
    """The key, or InputError saying that `what` needs one."""
    if key is None:
        raise InputError(f"{what} is randomised and needs key=jax.random.key(seed)")
    return key


def reorder(
    weight: Float[Array, "m n"], hessian: Float[Array, "n n"], order: Array
) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """(W, H) with the columns of W, and the rows and columns of H, in `order`."""
    return jnp.take(weight, order, axis=1), jnp.take(jnp.take(hessian, order, axis=0), order, axis=1)
