"""Cutting token ids into windows and choosing among the windows: pure functions on host arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from qjax.errors import InputError

__all__ = ["CHOICES", "choose", "document_windows", "interleave", "permutation", "shares", "stream_windows"]

CHOICES = ("random", "even", "first")


def permutation(count: int, seed: int) -> Int[np.ndarray, " count"]:
    """A permutation of `0 … count-1`: the order of `count` raw Philox words, the same for every version of numpy."""
    return np.argsort(np.random.Philox(seed).random_raw(count), kind="stable")


def choose(available: int, wanted: int, how: str, seed: int) -> Int[np.ndarray, " wanted"]:
    """Indices of `wanted` of `available` windows, all different.

    `random`: the first `wanted` entries of the seed's permutation, so that a smaller budget is a prefix of a larger
    one; `even`: the centres `⌊(i + 1/2)·available/wanted⌋`; `first`: `0 … wanted-1`. Raises InputError for another
    `how`.
    """
    if how == "random":
        return permutation(available, seed)[:wanted]
    if how == "even":
        return ((2 * np.arange(wanted) + 1) * available) // (2 * wanted)
    if how == "first":
        return np.arange(wanted)
    raise InputError(f"windows can be chosen as {', '.join(CHOICES)}; found {how!r}")


def stream_windows(
    ids: Int[np.ndarray, " tokens"], length: int, prefix: int | None = None
) -> Int[np.ndarray, "windows length"]:
    """Non-overlapping windows of one long stream; the tail that fills no window is dropped.

    Without `prefix` window `i` is `ids[i·length : (i+1)·length]`; with it, `prefix` and then the next `length - 1` ids.
    """
    step = length if prefix is None else length - 1
    body = ids[: len(ids) // step * step].reshape(-1, step)
    if prefix is None:
        return body
    return np.concatenate([np.full((len(body), 1), prefix, dtype=ids.dtype), body], axis=1)


def document_windows(
    documents: Iterable[tuple[int, Int[np.ndarray, " tokens"]]],
    length: int,
    *,
    random_start: bool,
    seed: int,
    prefix: int | None = None,
) -> Iterator[Int[np.ndarray, " length"]]:
    """One window of every (index, ids) document with enough tokens: its first ones, or from a start drawn by index."""
    step = length if prefix is None else length - 1
    for index, ids in documents:
        spare = len(ids) - step
        if spare < 0:
            continue
        start = int(np.random.Philox(key=[seed, index]).random_raw() % (spare + 1)) if random_start else 0
        window = ids[start : start + step]
        yield window if prefix is None else np.concatenate([np.array([prefix], dtype=ids.dtype), window])


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights` into integers (largest remainder, the earlier part wins a tie)."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all parts, each part spread evenly over the result, so that every prefix keeps the proportions."""
    places = itertools.chain.from_iterable(
        (((row + 0.5) / len(part), index, row) for row in range(len(part))) for index, part in enumerate(parts)
    )
    return np.stack([parts[index][row] for _, index, row in sorted(places)])
