"""The order in which windows are read: a pure function of the position, so that a run can go on anywhere."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int

__all__ = ["random_bits", "windows_at"]


@functools.lru_cache(maxsize=4)
def random_bits(seed: int, epoch: int, count: int) -> np.ndarray:
    """64 random bits for each of `count` things of an epoch; fewer of them are the first ones.

    Philox's raw output is stable over numpy versions, permutations made from it are not promised.
    """
    return np.asarray(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.argsort(random_bits(seed, epoch, windows), kind="stable")


def windows_at(position: int, count: int, windows: int, seed: int) -> Int[np.ndarray, " count"]:
    """Indices `position … position + count` of an endless reading in which every epoch is shuffled anew."""
    found = []
    for index in range(position, position + count):
        epoch, place = divmod(index, windows)
        found.append(_order(seed, epoch, windows)[place])
    return np.array(found, np.int64)
