"""Products with a matrix whose rows or columns lie on different devices of the mesh axis "model".

A column-parallel matrix (q, k, v, gate, up) has its rows shared out: every device has the whole input and makes its own
outputs. A row-parallel one (o, down) has its columns shared out: every device has its own inputs and makes a summand of
all outputs; `ỹ = Σ x̃ᵢ Q̃ᵢᵀ` is one all-reduce, in float32 and *before* the output transform, which is linear.

Block-diagonal transforms whose blocks lie within devices need nothing else. A transform of the whole axis needs the
small activation vector: an all-gather of ỹ in a column-parallel matrix, of x in a row-parallel one. Codes never move.
Source: QTIP (2406.11235), tensor-parallel variants; EXL3's 128-blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.incoherence.transform import Transform
from qjax.matrix.kernel_layout import pack
from qjax.matrix.quantized import QuantizedMatrix
from qjax.tensor_parallel.split import half_transforms, part_size, parts
from qjax.typing import Leaf, pytree, static

__all__ = ["AXIS", "ColumnParallel", "RowParallel", "RowParallelDense", "Stacked", "column_parallel", "row_parallel"]

AXIS = "model"
_NO_FORM = "a {}, which has no tensor-parallel form; use mesh.model=1, or merge adapters first"


@pytree
class Stacked:
    """One pytree per device, stacked on a leading axis that is split over the mesh axis "model"."""

    leaves: Any

    def own(self) -> Any:
        """The tree of this device (inside `shard_map`)."""
        return jax.tree.map(lambda leaf: leaf[0], self.leaves)


@pytree
class Shards:
    """The code parts of a matrix: what differs between devices, and what all have (the codebook's tables)."""

    own: Stacked
    same: Any
    structure: Any = static()
    shared: tuple[bool, ...] = static()

    def matmul(self, x: Array) -> Array:
        """`x Q̃ᵢᵀ` with this device's part."""
        own, same = iter(self.own.own()), iter(self.same)
        leaves = [next(same) if shared else next(own) for shared in self.shared]
        return jax.tree.unflatten(self.structure, leaves).matmul(x)


def _gained(x: Array, gain: Any) -> Array:
    return x if gain is None else x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _own(value: Transform | Stacked) -> Transform:
    return value.own() if isinstance(value, Stacked) else value


@pytree
class ColumnParallel:
    """Rows `i · out … (i + 1) · out` of a matrix on device i; its `matmul` gives those outputs.

    Attributes:
      shards: of the rotated codes.
      entry: transform of the whole input.
      exit: of the outputs, per device or whole.
      gathered: outputs are gathered before they are transformed.
      rows: of the rotated matrix, padding included.
    """

    shards: Shards
    entry: Transform
    exit: Transform | Stacked
    permutation: Leaf
    input_gain: Leaf
    output_gain: Stacked | None
    gathered: bool = static()
    rows: int = static()
    out: int = static()

    @property
    def collectives(self) -> dict[str, int]:
        """Values per token by collective."""
        return {"all-gather": self.rows} if self.gathered else {}

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """This device's outputs, in the dtype of x; inside `shard_map` over "model"."""
        rotated = self.entry.input(_gained(x, self.input_gain))
        if self.permutation is not None:
            rotated = jnp.take(rotated, self.permutation.astype(jnp.int32), axis=-1)
        y = self.shards.matmul(rotated)
        if self.gathered:
            y = jax.lax.all_gather(y, AXIS, axis=y.ndim - 1, tiled=True)[..., : self.rows]
            y = _own(self.exit).output(y)
            y = jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(AXIS) * self.out, self.out, axis=-1)
        else:
            y = _own(self.exit).output(y)
        return _gained(y, None if self.output_gain is None else self.output_gain.own()).astype(x.dtype)


@pytree
class RowParallel:
    """Columns `i · in … (i + 1) · in` of a matrix on device i; its `matmul` gives all outputs, on every device.

    Attributes:
      shards: of the rotated codes.
      entry: transform of the inputs, per device or whole.
      exit: of the whole output.
      gathered: inputs are gathered before they are transformed.
      columns: of a part, padding included.
    """

    shards: Shards
    entry: Transform | Stacked
    exit: Transform
    permutation: Leaf
    input_gain: Stacked | None
    output_gain: Leaf
    gathered: bool = static()
    columns: int = static()

    @property
    def collectives(self) -> dict[str, int]:
        """Values per token by collective."""
        gather = {"all-gather": self.exit.shape[1]} if self.gathered else {}
        return {**gather, "all-reduce": self.exit.padded[0]}

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """All outputs, in the dtype of x, of this device's inputs and those of the others; inside `shard_map`."""
        own = _gained(x, None if self.input_gain is None else self.input_gain.own())
        if self.gathered:
            rotated = _own(self.entry).input(jax.lax.all_gather(own, AXIS, axis=own.ndim - 1, tiled=True))
            if self.permutation is not None:
                rotated = jnp.take(rotated, self.permutation.astype(jnp.int32), axis=-1)
            devices = jax.lax.axis_size(AXIS)
            surplus = devices * self.columns - rotated.shape[-1]
            rotated = jnp.pad(rotated, [(0, 0)] * (rotated.ndim - 1) + [(0, surplus)])
            rotated = jax.lax.dynamic_slice_in_dim(
                rotated, jax.lax.axis_index(AXIS) * self.columns, self.columns, axis=-1
            )
        else:
            rotated = _own(self.entry).input(own)
        y = jax.lax.psum(self.shards.matmul(rotated).astype(jnp.float32), AXIS)
        return _gained(self.exit.output(y), self.output_gain).astype(x.dtype)


@pytree
class RowParallelDense:
    """A dense matrix whose columns are shared out: `x Wᵀ = Σ xᵢ Wᵢᵀ`, summed in float32."""

    weight: Leaf

    @property
    def collectives(self) -> dict[str, int]:
        """Values per token by collective."""
        return {"all-reduce": self.weight.shape[0]}

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """All outputs, in the dtype of x; inside `shard_map`."""
        y = jnp.einsum("...i,oi->...o", x, self.weight.astype(x.dtype), preferred_element_type=jnp.float32)
        return jax.lax.psum(y, AXIS).astype(x.dtype)


def _shards(matrix: QuantizedMatrix, axis: int, count: int, packed: bool) -> Shards:
    found: list[Any] = [pack(part) if packed else part for part in parts(matrix, axis, count)]
    flat = [jax.tree_util.tree_flatten_with_path(part) for part in found]
    names = [{str(getattr(key, "name", key)) for key in path} for path, _ in flat[0][0]]
    shared = tuple(bool(name & {"codebook", "table", "unit"}) for name in names)
    columns = list(zip(*([np.asarray(leaf) for _, leaf in leaves] for leaves, _ in flat), strict=True))
    own = [np.stack(column) for column, same in zip(columns, shared, strict=True) if not same]
    return Shards(Stacked(own), [c[0] for c, same in zip(columns, shared, strict=True) if same], flat[0][1], shared)


def _stacked(trees: list[Any]) -> Stacked:
    return Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))


def _gains(gain: Any, count: int) -> Stacked | None:
    return None if gain is None else Stacked(np.asarray(gain).reshape(count, -1))


def _side(transform: Transform, axis: int) -> Transform:
    """The transform of the outputs (0) or of the inputs (1) alone."""
    if axis == 0:
        return Transform(transform.output_rotation, None, None, transform.shape, transform.padded)
    return Transform(None, transform.input_rotation, transform.rescale, transform.shape, transform.padded)


@functools.singledispatch
def column_parallel(matrix: Any, count: int, packed: bool) -> Any:
    """An operator with its outputs shared out among `count` devices, which divides them; host arrays.

    `packed`: parts in the layout of the kernels, where they have one. What it gives has `matmul` and `collectives`, and
    its arrays are on every device but for those in `Stacked`. Raises InputError for an operator that has no such form.
    """
    raise InputError(_NO_FORM.format(type(matrix).__name__))


@functools.singledispatch
def row_parallel(matrix: Any, count: int, packed: bool) -> Any:
    """As `column_parallel` with the inputs shared out."""
    raise InputError(_NO_FORM.format(type(matrix).__name__))


@column_parallel.register(QuantizedMatrix)
def _column_parallel_quantized(matrix: QuantizedMatrix, count: int, packed: bool) -> ColumnParallel:
    halves, transform = half_transforms(matrix, 0, count), matrix.transform
    return ColumnParallel(
        shards=_shards(matrix, 0, count, packed),
        entry=_side(transform, 1),
        exit=_side(transform, 0) if halves is None else _stacked(halves),
        permutation=matrix.permutation,
        input_gain=matrix.input_gain,
        output_gain=_gains(matrix.output_gain, count),
        gathered=halves is None,
        rows=transform.padded[0],
        out=transform.shape[0] // count,
    )


@row_parallel.register(QuantizedMatrix)
def _row_parallel_quantized(matrix: QuantizedMatrix, count: int, packed: bool) -> RowParallel:
    halves = None if matrix.permutation is not None else half_transforms(matrix, 1, count)
    transform = matrix.transform
    return RowParallel(
        shards=_shards(matrix, 1, count, packed),
        entry=_side(transform, 1) if halves is None else _stacked(halves),
        exit=_side(transform, 0),
        permutation=matrix.permutation,
        input_gain=_gains(matrix.input_gain, count),
        output_gain=matrix.output_gain,
        gathered=halves is None,
        columns=part_size(matrix, 1, count),
    )
