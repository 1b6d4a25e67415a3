"""Calibration sequences over the devices of a mesh: which ones a process holds, and how they become equal steps.

Sequences form batches of equal size. In step s device d of N computes batch `s N + d`; what the last step lacks is
filled up with mask 0. With one device these are the plain batches, in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qjax.runtime.mesh import EACH, place, single
from qjax.streams import activations
from qjax.streams.activations import Activations
from qjax.typing import HostOrDevice

__all__ = ["Spread", "Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of all devices; arrays are split by `EACH`.

    Attributes:
      where: the rows that the step's sequences have in what this process holds.
      parts: `[devices · batch, ...]`, one of each array that was fed.
      mask: `[devices · batch]` float32, 0 for what only fills the step up.
      numbers: `[devices · batch]` uint32, the number of every sequence among all (beyond them for what fills up).
      done: how many sequences of all are finished after the step.
    """

    where: slice
    parts: tuple[HostOrDevice, ...]
    mask: HostOrDevice
    numbers: HostOrDevice
    done: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """`sequences` from number `start` on, in batches of `batch`, over the devices of `mesh` (by default one)."""

    sequences: int
    batch: int
    mesh: Mesh = dataclasses.field(default_factory=single)
    start: int = 0

    @property
    def each(self) -> NamedSharding:
        """The first axis over all devices."""
        return NamedSharding(self.mesh, EACH)

    def _ranges(self) -> list[tuple[int, int, int]]:
        """Of every step: the number of this process's first sequence, and the range of those that there are."""
        me = jax.process_index()
        slots = [slot for slot, device in enumerate(self.mesh.devices.flat) if device.process_index == me]
        low, high = slots[0] * self.batch, (slots[-1] + 1) * self.batch  # a process's devices are neighbours
        clip = lambda i: min(i, self.sequences)  # noqa: E731
        steps = range(self.start, self.sequences, self.batch * self.mesh.size)
        return [(s + low, clip(s + low), clip(s + high)) for s in steps]

    def take(self, whole: np.ndarray) -> np.ndarray:
        """The part `[held, ...]` of all sequences that this process holds."""
        if jax.process_count() == 1:
            return whole[self.start :]
        return np.concatenate([whole[a:b] for _, a, b in self._ranges()] or [whole[:0]])

    def feed(self, *arrays: Activations) -> Iterator[Step]:
        """The steps over arrays `[held, ...]` of this process."""
        count = self.batch * sum(device.process_index == jax.process_index() for device in self.mesh.devices.flat)
        place = 0
        for number, (first, a, b) in enumerate(self._ranges()):
            where = slice(place, place + b - a)
            mask = np.zeros(count, np.float32)
            mask[: b - a] = 1
            numbers = (first + np.arange(count)).astype(np.uint32)
            parts = tuple(self._put(_filled(x[where], count)) for x in arrays)
            done = min(self.start + (number + 1) * self.batch * self.mesh.size, self.sequences)
            place = where.stop
            yield Step(where, parts, self._put(mask), self._put(numbers), done)

    def whole(self, tree: Any) -> Any:
        """The arrays of a tree on all devices, for the steps' programs; for one device as they are."""
        return tree if self.mesh.size == 1 else place(tree, self.mesh)

    def _put(self, own: HostOrDevice) -> HostOrDevice:
        if self.mesh.size == 1:
            return own  # the program takes it as it is
        if self.each.is_fully_addressable:
            return jax.device_put(own, self.each)
        return jax.make_array_from_process_local_data(self.each, np.asarray(own))

    def put(self, out: Activations, step: Step, array: jax.Array) -> None:
        """Write what this process holds of a step's result `[devices · batch, ...]` where it belongs in `out`."""
        count = step.where.stop - step.where.start
        if self.mesh.size == 1:
            activations.put(out, step.where.start, count, array)
            return
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        whole = np.concatenate([np.asarray(shard.data) for shard in shards])
        activations.put(out, step.where.start, count, whole)

    def sums(self, make: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...]) -> HostOrDevice:
        """An array `[devices, *shape]` with `make((1, *shape))` on every device: a running sum of its own for each."""
        if self.mesh.size == 1:
            return make((1, *shape))
        return jax.make_array_from_callback((self.mesh.size, *shape), self.each, lambda _: make((1, *shape)))


def _filled(part: HostOrDevice, count: int) -> HostOrDevice:
    """`part` with its first row (zeros when it has none) repeated up to `count` rows."""
    lack = count - len(part)
    if not lack:
        return part
    part = np.asarray(part)
    row = part[:1] if len(part) else np.zeros((1, *part.shape[1:]), part.dtype)
    return np.concatenate([part, np.repeat(row, lack, axis=0)])
