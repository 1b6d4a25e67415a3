"""Sketches in the store: collected range by range and pass by pass, with checkpoints inside a pass."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qjax.errors import ArtifactError, InputError
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.products import NONE
from qjax.hessian.sketch import Sketch, assembled, divided
from qjax.hessian.sketch_collect import Sums, empty_sums, finish_sums, known_factors, ranges, reduce_sums, sketch_pass
from qjax.hessian.store import HessianStore, pack_triangle, unpack_triangle
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.runtime.atomic import read_json, read_safetensors, write_json, write_safetensors
from qjax.runtime.distributed import on_primary
from qjax.runtime.mesh import single
from qjax.streams.batches import Spread
from qjax.typing import HostOrDevice

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
    mesh: Mesh | None = None,
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
      mesh: as in `qjax.hessian.collect`; process 0 writes. A collection on several devices continues on any number of
        them, to the same sums but for their last bits: a checkpoint holds the sum over the devices.

    Raises InputError for prefixes that the pass has no sums of.
    """
    mesh = mesh or single()
    prefixes = prefixes or {}
    _check_prefixes(prefixes, sketch, len(tokens), batch * mesh.size)
    last = len(sketch.passes) - 1
    plan = ranges(config, budget)
    total = len(sketch.passes) * len(plan) * len(tokens)
    before = None
    if moments is not None and sketch.estimator == "sketch_a":
        before = functools.partial(_one_factor, moments)
    for number, update in enumerate(sketch.passes):
        own = key if number == last else f"{key}/pass_{number}"
        for position, part in enumerate(plan):
            finished = (number * len(plan) + position) * len(tokens)

            def whole(own: str = own, part: range = part) -> bool:
                return all(store.load(k, index) is not None for k in (own, *prefixes.values()) for index in part)

            if on_primary(whole):
                continue
            folder = store.path / key / "partial"
            name = f"pass_{number}_blocks_{part.start}_{part.stop}"

            def newest(folder: pathlib.Path = folder, name: str = name, part: range = part) -> int | None:
                done = _newest(folder, name, part)
                gone = done is not None and any(
                    store.load(k, index) is None for size, k in prefixes.items() if size <= done for index in part
                )
                missed = done is not None and bool(prefixes) and done % (batch * mesh.size) > 0
                return None if gone or missed else done  # where the sums of a prefix are gone: from the beginning

            found = on_primary(newest)
            spread = Spread(len(tokens), batch, mesh, 0 if found is None else found)
            if found is None:
                sums = {index: empty_sums(config, update, spread) for index in part}
            else:
                target = folder / f"{name}_done_{found}"
                sums = {i: _on_mesh(_load(target / f"block_{i:04d}.safetensors"), spread) for i in part}
            known = None if before is None else (lambda index, load=before: known_factors(load(index)))
            saved = time.monotonic()
            steps = sketch_pass(config, params, tokens, sketch, number, sums, known, spread=spread, budget=budget)
            for done in steps:
                if progress is not None:
                    progress(finished + done, total)
                if done in prefixes:
                    for index in part:
                        made = finish_sums(sums[index], index, config, None, spread, done)
                        on_primary(functools.partial(store.save, prefixes[done], index, made))
                if done < len(tokens) and on_primary(lambda since=saved: time.monotonic() - since >= checkpoint):
                    _save(folder, name, done, sums, spread)
                    saved = time.monotonic()
            for index in part:
                factors = None if known is None else known(index)
                made = finish_sums(sums[index], index, config, factors, spread)
                on_primary(functools.partial(store.save, own, index, made))
            on_primary(functools.partial(shutil.rmtree, folder, ignore_errors=True))
        before = store.loader(own)
    for number in range(last):
        on_primary(functools.partial(shutil.rmtree, store.path / key / f"pass_{number}", ignore_errors=True))
    return store.loader(key)


def _one_factor(moments: Callable[[int], dict[str, Hessian]], index: int) -> dict[str, Hessian]:
    """The moments of a block with one input factor for every expert."""
    factor = ExpertFactor()
    return {name: factor(hessian, f"layers.{index}.{name}") for name, hessian in moments(index).items()}


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


def _save(folder: pathlib.Path, name: str, done: int, sums: dict[int, Sums], spread: Spread) -> None:
    """A checkpoint: a folder whose `complete.json` is written last; older ones are removed after that.

    With one device both parts of the sums are kept, so that the result is the same to the last bit; with several their
    sum over the devices.
    """
    target = folder / f"{name}_done_{done}"
    for index, block in sums.items():
        if spread.mesh.size == 1:
            parts = {"total": block.total, "carry": block.carry}
            arrays, bad = jax.device_get((jax.tree.map(lambda a: a[0], parts), block.bad))
        else:
            total, bad = jax.device_get(reduce_sums(block, mesh=spread.mesh))
            arrays = {"total": total}
        triangles = {
            f"{linear}:{factor}:{what}": pack_triangle(assembled([np.asarray(part) for part in parts]))
            for what, tree in arrays.items()
            for linear, factors in tree.items()
            for factor, parts in factors.items()
        }
        first = {"bad": json.dumps({linear: int(np.min(value)) for linear, value in bad.items()})}
        file = target / f"block_{index:04d}.safetensors"
        on_primary(functools.partial(_write, file, triangles, first))

    def complete() -> None:
        write_json(target / "complete.json", {"done": done})
        for other in folder.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    on_primary(complete)


def _write(file: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    write_safetensors(file, arrays, metadata)


def _newest(folder: pathlib.Path, name: str, part: range) -> int | None:
    """The number of sequences in the newest sound checkpoint of this pass and range, or None."""
    found = sorted(folder.glob(f"{name}_done_*/complete.json"), key=lambda p: int(p.parent.name.rsplit("_", 1)[1]))
    for file in reversed(found):
        try:
            done = int(read_json(file)["done"])
            for index in part:
                _load(file.parent / f"block_{index:04d}.safetensors")
        except ArtifactError:  # damaged: an older one, or from the beginning
            continue
        return done
    return None


def _load(path: pathlib.Path) -> Sums:
    arrays, metadata = read_safetensors(path)
    trees: dict[str, dict[str, dict[str, tuple[np.ndarray, ...]]]] = {"total": {}, "carry": {}}
    for name, values in arrays.items():
        linear, factor, what = name.split(":")
        trees[what].setdefault(linear, {})[factor] = divided(np.tril(unpack_triangle(values)))
    carry = trees["carry"] or jax.tree.map(np.zeros_like, trees["total"])
    bad = json.loads(metadata["bad"])
    linears = list(trees["total"])
    if not all(isinstance(bad.get(linear), int) and 0 <= bad[linear] <= NONE for linear in linears):
        raise ArtifactError(f"{path}: sequences that are not finite are {bad}; expected whole numbers up to {NONE}")
    return Sums(trees["total"], carry, {linear: np.uint32(bad[linear]) for linear in linears})


def _on_mesh(sums: Sums, spread: Spread) -> Sums:
    """The sums of a checkpoint as those of the first device; the others begin with zeros."""

    def first(array: Any, rest: Any) -> HostOrDevice:
        if spread.mesh.size == 1:
            return np.asarray(array)[None]

        def part(index: Any) -> np.ndarray:
            return np.asarray(array)[None] if index[0].start in (0, None) else np.full((1, *np.shape(array)), rest)

        return jax.make_array_from_callback((spread.mesh.size, *np.shape(array)), spread.each, part)

    zero = np.float32(0)
    total, carry = (jax.tree.map(lambda a: first(a, zero), tree) for tree in (sums.total, sums.carry))
    return Sums(total, carry, jax.tree.map(lambda a: first(a, NONE), sums.bad))
