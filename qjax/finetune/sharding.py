"""Parameters, optimiser state and batches of a tuning step shared out among the devices of the mesh axis "data".

Every array lies in equal parts on all devices, cut along one of its axes. A step gathers the arrays of one block where
the block is computed (again in the backward pass with `remat`), so that no device ever holds all of them; the transpose
of that gather sums the gradients of all devices and leaves to each its own part (a reduce-scatter). The optimiser works
on parts. Every device reads its share of the batch; the loss is the mean of theirs, as on one device.
Source: Rajbhandari et al., "ZeRO" (1910.02054), stage 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from qjax.errors import InputError
from qjax.runtime.mesh import place

__all__ = ["AXIS", "Parts", "check_mesh", "placing"]

AXIS = "data"
_SMALLEST = 64  # values of one layer from which an array is cut: a gather of fewer costs more than it saves


def check_mesh(mesh: Mesh, batch: int) -> None:
    """Raises InputError for a mesh that a tuning step cannot use, or a batch that does not divide among its devices."""
    if mesh.shape["model"] != 1:
        raise InputError(
            f"mesh.model is {mesh.shape['model']}; fine-tuning shares parameters and batches out over mesh.data alone: "
            "use mesh.model=1"
        )
    if batch % mesh.shape[AXIS]:
        raise InputError(
            f"finetune.batch is {batch} and mesh.data {mesh.shape[AXIS]}; every device reads equally many windows: use "
            f"a batch that is a multiple of {mesh.shape[AXIS]}"
        )


def _cut_axis(name: str, shape: tuple[int, ...], count: int) -> int | None:
    first = 1 if name.startswith("layers.") else 0
    sizes = [(size, -axis) for axis, size in enumerate(shape) if axis >= first and size % count == 0]
    if count == 1 or not sizes or np.prod(shape[first:], dtype=np.int64) < _SMALLEST:
        return None
    return -max(sizes)[1]


def placing(mesh: Mesh | None) -> Callable[[str, Any], jax.Array]:
    """`place(name, array)`: on the device, or in the parts of `Parts.of` on a mesh, without a whole copy on any."""
    if mesh is None:
        return lambda name, array: jax.device_put(array)
    return lambda name, array: Parts.of({name: array}, mesh).placed({name: array})[name]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which axis of which array is cut; hashable, a static argument of the step.

    Attributes:
      mesh: its axis "data" has the devices.
      axes: (name, axis) of every array that is cut; the others are whole on every device.
    """

    mesh: Mesh
    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, Any], mesh: Mesh) -> Parts:
        """The largest axis that divides among the devices, not the axis of layers of a stack (`layers.…`)."""
        axes = {name: _cut_axis(name, array.shape, mesh.shape[AXIS]) for name, array in arrays.items()}
        return cls(mesh, tuple((name, axis) for name, axis in axes.items() if axis is not None))

    def axis(self, name: str) -> int | None:
        """The axis that is cut, or None."""
        return dict(self.axes).get(name)

    def spec(self, name: str) -> P:
        """The partition of an array on the mesh."""
        axis = self.axis(name)
        return P() if axis is None else P(*[None] * axis, AXIS)

    def specs(self, arrays: Mapping[str, Any]) -> dict[str, P]:
        """`spec` of every array, by its name."""
        return {name: self.spec(name) for name in arrays}

    def placed(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays in parts on the mesh."""
        return {name: place(array, self.mesh, self.spec(name)) for name, array in arrays.items()}

    def whole(self, name: str, array: Array, layer: bool = False) -> Array:
        """The whole array on every device, inside `shard_map`; `layer`: of one layer of a stack."""
        axis = self.axis(name)
        return array if axis is None else jax.lax.all_gather(array, AXIS, axis=axis - layer, tiled=True)

    def mean_gradient(self, gradient: Mapping[str, Array]) -> dict[str, Array]:
        """Gradients of the mean loss from those of the devices' own losses; parts are summed already."""
        count = np.float32(self.mesh.shape[AXIS])
        return {
            name: (jax.lax.psum(value, AXIS) if self.axis(name) is None else value) / count.astype(value.dtype)
            for name, value in gradient.items()
        }

    def kept(self, tree: Any) -> Any:
        """Arrays by name, at any depth of a tree, held where their parts lie (inside `jit`)."""

        def keep(path: Any, leaf: Array) -> Array:
            names = [str(getattr(key, "key", "")) for key in path]
            spec = next((self.spec(name) for name in reversed(names) if self.axis(name) is not None), P())
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(keep, tree)

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device with its parts."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
