"""The mesh of devices that a run computes on: axes "data" (sequences, rows) and "model" (features)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qjax.errors import InputError
from qjax.registry import Count

__all__ = ["AXES", "EACH", "WHOLE", "MeshSettings", "fetched", "make", "place", "single"]

AXES = ("data", "model")
EACH = PartitionSpec(AXES)
"""The first axis is split over all devices of the mesh."""
WHOLE = PartitionSpec()
"""A whole copy on every device."""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The number of devices of each axis, `data · model` in all.

    Attributes:
      data: devices over which sequences and rows are split; None takes all that there are.
      model: devices over which the features of one matrix are split (tensor-parallel evaluation and decoding).

    Raises InputError for a size that is not a positive whole number.
    """

    data: Count | None = 1
    model: Count = 1

    def __post_init__(self) -> None:
        for axis, size in (("data", self.data), ("model", self.model)):
            if axis == "data" and size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                also = ", or null for all devices" if axis == "data" else ""
                raise InputError(f"mesh.{axis} is {size!r}; it is a number of devices, at least 1{also}")

    def make(self) -> Mesh:
        """`make(data, model)`."""
        return make(self.data, self.model)


def make(data: int | None = 1, model: int = 1) -> Mesh:
    """A mesh `[data, model]` with axes of type Auto over the devices of all processes.

    A process's devices are neighbours, and every process gives equally many (each must hold a part of every array).
    The same settings give the same mesh. Touches the devices: `qjax.runtime.distributed.initialise` comes before.

    Raises InputError when more devices are asked for than there are, or when they cannot be shared out evenly.
    """
    settings = MeshSettings(data, model)
    devices, processes = jax.devices(), jax.process_count()
    if settings.data is None:
        if len(devices) % settings.model:
            raise InputError(
                f"mesh.model is {settings.model} and there are {len(devices)} devices; with mesh.data=null it must "
                "divide their number"
            )
        settings = dataclasses.replace(settings, data=len(devices) // settings.model)
    assert settings.data is not None
    size = settings.data * settings.model
    if size > len(devices):
        raise InputError(
            f"mesh.data={settings.data} mesh.model={settings.model} asks for {size} devices and there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)} ({devices[0].platform}, {processes} "
            f"process{'' if processes == 1 else 'es'}); ask for fewer, set JAX_NUM_CPU_DEVICES for more devices of a "
            "CPU, or start more processes (distributed.coordinator=…)"
        )
    if size % processes:
        raise InputError(
            f"mesh.data={settings.data} mesh.model={settings.model} asks for {size} devices of {processes} processes; "
            "every process gives equally many: ask for a multiple of the number of processes"
        )
    share = size // processes
    held = Counter(device.process_index for device in devices)
    short = [process for process in range(processes) if held[process] < share]
    if short:
        raise InputError(
            f"mesh.data={settings.data} mesh.model={settings.model} asks every process for {share} devices and "
            f"process {short[0]} has {held[short[0]]}; give all processes the same number of devices"
        )
    chosen = [
        device
        for process in range(processes)
        for device in sorted((d for d in devices if d.process_index == process), key=lambda d: d.id)[:share]
    ]
    grid = np.array(chosen, dtype=object).reshape(settings.data, settings.model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def single() -> Mesh:
    """The mesh `[1, 1]` of this process's first device."""
    return Mesh(np.array(jax.local_devices()[:1], dtype=object).reshape(1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


def place(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """The arrays of a tree, known whole to every process, on the mesh: split by `spec`, by default on every device.

    Only the parts that this process holds are copied. Nothing is communicated and nothing compiled.
    """
    sharding = NamedSharding(mesh, spec)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetched(tree: Any) -> Any:
    """The arrays of a tree on the host, whole, also those whose parts lie with other processes.

    All processes that hold parts call this with the same tree.
    """

    def get(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(get, tree)
