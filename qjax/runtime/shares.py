"""Matrices over devices and processes: where rows feed back into each other, whole matrices are shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jax.sharding import Mesh

__all__ = ["compute", "shares"]

T = TypeVar("T")


def shares(costs: Mapping[str, float], count: int) -> dict[str, int]:
    """The place, of `count`, of each task: the costliest first, each to the place with the least so far.

    Depends on nothing but the arguments, so that all processes come to the same answer.
    """
    load = [0.0] * count
    result = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        result[name] = min(range(count), key=lambda place: (load[place], place))
        load[result[name]] += costs[name]
    return result


def compute(
    tasks: Mapping[str, Callable[[jax.Device], T]], costs: Mapping[str, float], mesh: Mesh, *, all_here: bool = False
) -> dict[str, T]:
    """The results of those tasks that fall to this process, one at a time on each of its devices.

    `all_here`: share all of them out among this process's devices. The first error is raised when all have ended.
    """
    devices = list(mesh.devices.flat)
    if all_here:
        devices = [device for device in devices if device.process_index == jax.process_index()]
    place = shares(costs, len(devices))

    def work(index: int) -> dict[str, T]:
        return {name: task(devices[index]) for name, task in tasks.items() if place[name] == index}

    own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index() and i in place.values()]
    if len(own) <= 1:
        parts = [work(index) for index in own]
    else:
        with ThreadPoolExecutor(len(own)) as pool:
            parts = list(pool.map(work, own))
    done = {name: result for part in parts for name, result in part.items()}
    return {name: done[name] for name in tasks if name in done}
