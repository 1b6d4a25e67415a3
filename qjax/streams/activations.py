"""Activations between blocks `[sequences, length, width]`: on the device, on the host, or in a mapped file on disk.

All three are read and written by ranges of sequences (`x[start:stop]`, `put`), so what works through the blocks does
not know where they lie. A place holds for a `with` block; outside of one it is the host.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

from qjax.errors import InputError
from qjax.runtime.durable import explained
from qjax.runtime.mesh import fetched

__all__ = ["PLACES", "Activations", "DeviceActivations", "Place", "empty", "like", "placed", "put"]

PLACES = ("device", "host", "disk")
_serial = itertools.count()


@dataclasses.dataclass(frozen=True)
class Place:
    """A place of activations.

    Attributes:
      where: "device", "host" or "disk".
      folder: of the files on disk; they have no name there, so nothing is left however the process ends.
    """

    where: str = "host"
    folder: pathlib.Path | None = None

    def __post_init__(self) -> None:
        if self.where not in PLACES or (self.where == "disk") != (self.folder is not None):
            raise InputError(f"activations lie in {self.where!r}; allowed are {', '.join(PLACES)}, disk with a folder")


_place: contextvars.ContextVar[Place] = contextvars.ContextVar("qjax_activations", default=Place())  # noqa: B039


@contextlib.contextmanager
def placed(place: Place) -> Iterator[None]:
    """Activations made in the block lie in `place`."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


class DeviceActivations:
    """Activations kept as the device arrays that the blocks gave, one per range of sequences that was written.

    A range is read as it was written (reading another one raises InputError); an array may have more rows than its
    range, the filling of the last batch, which are cut off when it is read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._parts: dict[int, tuple[int, jax.Array]] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: slice) -> jax.Array:
        start, stop, _ = where.indices(len(self))
        count, part = self._parts.get(start, (0, None))
        if part is None or start + count != stop:
            raise InputError(
                f"sequences {start} to {stop} were not written as one range; use the same batch throughout"
            )
        return part if count == part.shape[0] else part[:count]

    def write(self, start: int, count: int, values: Any) -> None:
        """Keep the first `count` rows of `values` as the sequences from `start` on."""
        self._parts[start] = count, jax.device_put(values)

    def __setitem__(self, where: slice, values: Any) -> None:
        start, stop, _ = where.indices(len(self))
        self.write(start, stop - start, values)


Activations: TypeAlias = Any
"""A NumPy array (mapped from a file or not) or `DeviceActivations`."""


def empty(shape: tuple[int, ...], dtype: Any) -> Activations:
    """Activations without values in the place that holds. Raises RunError where the disk is full or not writable."""
    place = _place.get()
    if place.where == "device":
        return DeviceActivations(shape, dtype)
    if place.folder is not None and 0 not in shape:
        return _mapped(place.folder, shape, np.dtype(dtype))
    return np.empty(shape, dtype)


def like(x: Activations) -> Activations:
    """Activations of the same shape and dtype, without values."""
    return empty(x.shape, x.dtype)


def put(out: Activations, start: int, count: int, values: jax.Array | np.ndarray) -> None:
    """Write the first `count` rows of `values` as the sequences from `start` on."""
    if isinstance(out, DeviceActivations):
        out.write(start, count, values)
        return
    out[start : start + count] = fetched(values)[:count]
    if isinstance(out, np.memmap):
        _forget(out)


def _mapped(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A file of the array's size, mapped and then removed from its folder: it is gone when nothing maps it any more."""
    size = int(np.prod(shape)) * dtype.itemsize
    path = folder / f".activations.{os.getpid()}-{next(_serial)}"
    with explained(path, size):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            path.unlink()
            os.posix_fallocate(
                descriptor, 0, size
            )  # a full disk is an error here, and no signal when a page is written
            return np.memmap(file, dtype, "r+", shape=shape)


def _forget(array: np.memmap) -> None:
    """Let go of the pages in memory; the system writes them to the file and reads them again when they are used."""
    mapping: Any = vars(array)["_mmap"]  # NumPy has no public name for it
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
