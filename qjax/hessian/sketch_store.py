"""Sketches in the store: collected range by range and pass by pass, with checkpoints inside a pass."""

from __future__ import annotations

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qjax.errors import ArtifactError, InputError
from qjax.hessian.sketch import Sketch
from qjax.hessian.sketch_collect import Sums, empty_sums, finish_sums, known_factors, ranges, sketch_pass
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import HessianStore, pack_triangle, unpack_triangle
from qjax.models.config import ModelConfig
from qjax.models.transformer import LINEARS
from qjax.run.atomic import read_json, read_safetensors, write_json, write_safetensors

__all__ = ["collect_into"]


def collect_into(
    store: HessianStore,
    key: str,
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    sketch: Sketch,
    *,
    batch: int,
    budget: float,
    checkpoint: float,
    moments: Callable[[int], dict[str, Hessian]] | None = None,
    prefixes: Mapping[int, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Callable[[int], dict[str, Hessian]]:
    """Make sure that the sketch of every block is stored under `key`; returns the loader of a block by index.

    Args:
      budget: bytes for the sums that are held at once; a pass is repeated for as many ranges of blocks as this needs.
        What the sums leave of it may keep activations, which saves their second evaluation.
      checkpoint: seconds between checkpoints of the sums. A killed collection continues from the last one, and ends in
        the same bytes.
      moments: `H_in = E[x xᵀ]` of a block, which sketch A starts from.
      prefixes: keys under which the sketches of the first so many sequences are stored too, to the bytes of a
        collection of their own.

    Raises InputError for prefixes that the pass has no sums of.
    """
    prefixes = prefixes or {}
    _check_prefixes(prefixes, sketch, len(tokens), batch)
    last = len(sketch.passes) - 1
    plan = ranges(params["blocks"], budget)
    total = len(sketch.passes) * len(plan) * len(tokens)
    before = moments if sketch.estimator == "sketch_a" else None
    for number, update in enumerate(sketch.passes):
        own = key if number == last else f"{key}/pass_{number}"
        for position, part in enumerate(plan):
            finished = (number * len(plan) + position) * len(tokens)
            if all(store.load(k, index) is not None for k in (own, *prefixes.values()) for index in part):
                continue
            folder = store.path / key / "partial"
            name = f"pass_{number}_blocks_{part.start}_{part.stop}"
            found = _resume(folder, name, part)
            if found is not None and any(
                store.load(k, index) is None for size, k in prefixes.items() if size <= found[0] for index in part
            ):
                found = None  # the sums of that prefix are gone
            start, sums = found or (0, {index: empty_sums(params["blocks"][index], update) for index in part})
            known = None if before is None else (lambda index, load=before: known_factors(load(index)))
            saved = time.monotonic()
            if start < len(tokens):
                steps = sketch_pass(
                    config, params, tokens, sketch, number, sums, known, batch=batch, start=start, budget=budget
                )
            for done in steps:
                if progress is not None:
                    progress(finished + done, total)
                if done in prefixes:
                    for index in part:
                        store.save(prefixes[done], index, finish_sums(sums[index], index, None, done))
                if done < len(tokens) and time.monotonic() - saved >= checkpoint:
                    _save(folder, name, done, sums)
                    saved = time.monotonic()
            for index in part:
                factors = None if known is None else known(index)
                store.save(own, index, finish_sums(sums[index], index, factors, len(tokens)))
            shutil.rmtree(folder, ignore_errors=True)
        before = store.loader(own)
    for number in range(last):
        shutil.rmtree(store.path / key / f"pass_{number}", ignore_errors=True)
    return store.loader(key)


def _check_prefixes(prefixes: Mapping[int, str], sketch: Sketch, sequences: int, batch: int) -> None:
    if prefixes and (sketch.estimator != "sketch_b" or len(sketch.passes) > 1):
        raise InputError(
            f"hessian.prefixes is {sorted(prefixes)} with {sketch.estimator} in {len(sketch.passes)} passes; only one "
            "pass of sketch_b has the sums of its prefixes: collect the others one by one with hessian.sequences"
        )
    for size in prefixes:
        if not 0 < size < sequences or size % batch:
            raise InputError(
                f"hessian.prefixes has {size}; with {sequences} sequences in batches of {batch} it takes multiples of "
                f"{batch} below {sequences}"
            )


def _save(folder: pathlib.Path, name: str, done: int, sums: dict[int, Sums]) -> None:
    """A checkpoint: a folder whose `complete.json` is written last; older ones are removed after that."""
    target = folder / f"{name}_done_{done}"
    for index, block in sums.items():
        block = jax.device_get(block)
        arrays = {
            f"{linear}:{factor}:{what}": pack_triangle(matrix)
            for what, tree in (("total", block.total), ("carry", block.carry))
            for linear, factors in tree.items()
            for factor, matrix in factors.items()
        }
        bad = {linear: int(value) for linear, value in block.bad.items()}
        write_safetensors(target / f"block_{index:04d}.safetensors", arrays, {"bad": json.dumps(bad)})
    write_json(target / "complete.json", {"done": done})
    for other in folder.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def _resume(folder: pathlib.Path, name: str, part: range) -> tuple[int, dict[int, Sums]] | None:
    """The newest complete checkpoint of this pass and range, or None."""
    found = sorted(folder.glob(f"{name}_done_*/complete.json"), key=lambda p: int(p.parent.name.rsplit("_", 1)[1]))
    for file in reversed(found):
        try:
            done = int(read_json(file)["done"])
            return done, {i: _load(file.parent / f"block_{i:04d}.safetensors") for i in part}
        except ArtifactError:  # damaged: an older one, or from the beginning
            continue
    return None


def _load(path: pathlib.Path) -> Sums:
    arrays, metadata = read_safetensors(path)
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"total": {}, "carry": {}}
    for name, values in arrays.items():
        linear, factor, what = name.split(":")
        trees[what].setdefault(linear, {})[factor] = unpack_triangle(values)
    bad = json.loads(metadata["bad"])
    return Sums(trees["total"], trees["carry"], {linear: np.int32(bad[linear]) for linear in LINEARS})
