"""Quantised matrices in the layout that the kernels of `pallas_kernels.dequant_matmul` read, for inference."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul import (
    PackedMatrix,
    RowMatrix,
    matmul,
    prepared,
    repack,
    repack_lattice,
    repack_trellis,
)
from pallas_kernels.dequant_matmul.layout import BLOCK, ROWS
from pallas_kernels.dequant_matmul.tables import TRELLISES
from pallas_kernels.dequant_matmul.trellis import CODES
from qjax.codebooks.e8p import E8P, e8p_table
from qjax.codebooks.e81b import e81b_table
from qjax.codebooks.residual import ResidualE8P
from qjax.codebooks.scalar import UniformCodebook
from qjax.codebooks.trellis import Trellis
from qjax.incoherence.transform import Transform
from qjax.matrix.lookup import Lookup
from qjax.matrix.operator import is_operator, operators
from qjax.matrix.quantized import QuantizedMatrix
from qjax.matrix.sums import Sum
from qjax.typing import Leaf, pytree

__all__ = ["PackedLinear", "obstacle", "pack", "pack_model"]


@pytree
class PackedLinear:
    """`W ≈ diag(a) Uᵀ Q V diag(b)` with Q repacked for the kernels; see `QuantizedMatrix`."""

    weight: PackedMatrix | RowMatrix
    transform: Transform
    permutation: Leaf = None
    output_gain: Leaf = None
    input_gain: Leaf = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x Wᵀ` in the dtype of x: rotated, multiplied with the packed codes, rotated back."""
        gained = lambda x, gain: x if gain is None else x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))  # noqa: E731
        rotated = self.transform.input(gained(x, self.input_gain))
        if self.permutation is not None:
            rotated = jnp.take(rotated, self.permutation.astype(jnp.int32), axis=-1)
        return gained(self.transform.output(matmul(rotated, self.weight)), self.output_gain).astype(x.dtype)


def obstacle(matrix: QuantizedMatrix) -> str | None:
    """The reason why a matrix has no kernel layout, None when it has one."""
    book, group = matrix.codebook, matrix.scaling.group
    if isinstance(book, Trellis):
        computed, tabled = book.code in CODES and book.V == 1, book.code in TRELLISES and book.V <= 2
        if not (computed or tabled) or book.bits > 4:
            return f"a trellis with code {book.code}, V = {book.V} and {book.bits} bits"
    if isinstance(book, Trellis | E8P | ResidualE8P):
        if matrix.scaling.zero is not None or group is not None:
            return f"codebook {book.name} with zeros or groups"
        return None
    if not isinstance(book, UniformCodebook):
        return f"codebook {book.spec().get('name')}"
    if group is not None and group % BLOCK and (group % ROWS or BLOCK % group):
        return f"groups of {group} columns"
    return None


@functools.partial(jax.jit, static_argnames=("bits", "shape", "group", "first"))
def _scalar(words: Array, scaling: Any, *, bits: int, shape: tuple[int, int], group: int | None, first: float) -> Any:
    scale, zero = _scales(scaling)
    offset = (jnp.float32(first) - zero) * scale
    scale, offset = (jnp.broadcast_to(v, jnp.broadcast_shapes(scale.shape, offset.shape)) for v in (scale, offset))
    return repack(words, bits, shape, scale, offset, group)


@functools.partial(jax.jit, static_argnames=("bits", "shape", "code", "L"))
def _trellis(words: Array, scaling: Any, table: Any, *, bits: int, shape: tuple[int, int], code: str, L: int) -> Any:
    return repack_trellis(words, bits, shape, _scales(scaling)[0], code, L, table)


@functools.partial(jax.jit, static_argnames=("bits", "shape", "residual"))
def _lattice(words: Array, scaling: Any, *, bits: int, shape: tuple[int, int], residual: float | None) -> Any:
    second = jnp.asarray(e81b_table()) if bits == 3 else None
    return repack_lattice(words, bits, shape, _scales(scaling)[0], jnp.asarray(e8p_table()), second, residual)


def _scales(scaling: Any) -> tuple[Array, Array]:
    """(scale, zero) float32 `[rows or 1, groups]`."""
    scale = jnp.asarray(scaling.unit, jnp.float32).reshape(1, 1)
    if scaling.relative is not None:
        scale = scale * scaling.relative.astype(jnp.float32)
    zero = jnp.zeros((1, 1), jnp.float32) if scaling.zero is None else scaling.zero.astype(jnp.float32)
    return scale, zero


def pack(matrix: Any) -> Any:
    """An operator for inference: a quantised matrix repacked, a sum of its terms, each packed; else as it is.

    Of a quantised matrix that the kernels have no layout for, `obstacle` says why.
    """
    if isinstance(matrix, Sum):
        return Sum(tuple(pack(term) for term in matrix.terms))
    if not isinstance(matrix, QuantizedMatrix) or obstacle(matrix) is not None:
        return matrix
    book: Any = matrix.codebook
    shape = matrix.transform.padded
    if isinstance(book, Trellis):
        table = book.table if book.code in TRELLISES else None
        weight = _trellis(matrix.packed, matrix.scaling, table, bits=book.bits, shape=shape, code=book.code, L=book.L)
    elif isinstance(book, E8P | ResidualE8P):
        residual = book.residual_scale if isinstance(book, ResidualE8P) else None
        weight = _lattice(matrix.packed, matrix.scaling, bits=int(book.bits), shape=shape, residual=residual)
    else:
        weight = _scalar(
            matrix.packed, matrix.scaling, bits=book.bits, shape=shape, group=matrix.scaling.group, first=book.first
        )
    return PackedLinear(prepared(weight), matrix.transform, matrix.permutation, matrix.output_gain, matrix.input_gain)


def pack_model(params: Any) -> Any:
    """Parameters with every operator packed, once, for inference.

    A quantised embedding stays as it is: its rows are looked up. Where it is the head too, a packed copy becomes that.
    """
    edges = {name: value for name, value in params.items() if name == "embed"}
    others = {name: value for name, value in params.items() if name != "embed"}
    packed = jax.tree.map(lambda leaf: pack(leaf) if is_operator(leaf) else leaf, others, is_leaf=is_operator)
    if "head" not in params and (tables := list(operators(edges).values())):
        packed["head"] = pack(tables[0].table if isinstance(tables[0], Lookup) else tables[0])
    return {**edges, **packed}
