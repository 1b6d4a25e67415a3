"""Loaders of a run's Hessians, made from the settings of the `hessian` group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qjax.data.stream import TokenStream
from qjax.errors import ArtifactError, InputError, suggested
from qjax.hessian.estimators import ESTIMATORS, Estimator
from qjax.hessian.fit import Fit, measure_fit
from qjax.hessian.sketch import Sketch
from qjax.hessian.sketch_collect import ranges
from qjax.hessian.sketch_store import collect_into
from qjax.hessian.store import HessianStore
from qjax.linalg.kronecker import Hessian
from qjax.matrix.arguments import hessian_of
from qjax.models.config import ModelConfig
from qjax.models.structure import structure
from qjax.models.transformer import layer_names
from qjax.runtime.atomic import read_json, write_json
from qjax.runtime.distributed import on_primary
from qjax.runtime.fingerprint import digest, identity
from qjax.runtime.lock import turn
from qjax.runtime.progress import Progress

__all__ = ["STREAMS", "Provided", "check_settings", "fits", "given", "provide"]

STREAMS = ("quantized", "original", "corrected")
Loader = Callable[[int], dict[str, Hessian]]


@dataclasses.dataclass(frozen=True)
class Provided:
    """Loaders by block index.

    Attributes:
      hessians: everything from the store, or None when the input factors are made block by block.
      outputs: the output factors in that case, or None.
      keys: the addresses in the store; the last one's collection has the factors that are used.
    """

    hessians: Loader | None
    outputs: Loader | None
    keys: tuple[str, ...]


def _sketch(settings: Mapping[str, Any]) -> Sketch | None:
    if settings["estimator"] not in ("sketch_a", "sketch_b"):
        return None
    known = {name: settings[name] for name in ("estimator", "rounds", "labels", "seed")}
    return Sketch(**known, compute=settings.get("compute", "float32"))


def estimator_of(settings: Mapping[str, Any]) -> Estimator:
    """The estimator that the `hessian` group describes. Raises InputError for a name or option that is not there."""
    return ESTIMATORS.build({"name": settings["estimator"], **{k: v for k, v in settings.items() if k != "estimator"}})


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises InputError for a `hessian` group that says something impossible."""
    if settings["estimator"] not in ESTIMATORS:
        raise InputError(f"hessian.estimator is {settings['estimator']!r}; there is: {', '.join(ESTIMATORS)}")
    estimator = estimator_of(settings)  # which checks every value by itself
    if settings["fit_sequences"] and settings["stream"] != "original":
        raise InputError(
            f"hessian.fit_sequences is {settings['fit_sequences']} and hessian.stream {settings['stream']!r}; a fit is "
            "measured for Hessians of the original model: hessian=original, sketch_a or sketch_b, or fit_sequences=0"
        )
    if settings.get("sequences") is not None and settings["stream"] != "original":
        raise InputError(
            f"hessian.sequences is {settings['sequences']} and hessian.stream {settings['stream']!r}; only Hessians of "
            "the original model are made of a part of the calibration sequences: use data.calibration_sequences"
        )
    if estimator.collects and settings["stream"] != "original":
        raise InputError(
            f"hessian.stream is {settings['stream']!r}; {settings['estimator']} is collected from the original model: "
            "use hessian.stream=original"
        )
    if _sketch(settings) is not None and settings["input"] == "sketch" and settings["stream"] != "original":
        raise InputError(
            f"hessian.stream is {settings['stream']!r} and a sketch's input factor is of the original model; "
            "use hessian.input=moment, or hessian.stream=original"
        )


def given(hessians: Mapping[str, Any], config: ModelConfig) -> Provided:
    """The Hessians of a mapping from layer names, of the original model, as `Hessian`s or arrays `[in, in]`.

    Raises InputError for a name that no layer has, with the nearest, and for layers that have none.
    """
    layers = layer_names(config)
    for name in hessians:
        if name not in layers:
            raise InputError(
                f"hessians: there is no layer {name!r}{suggested(name, layers)}; names look like {layers[0]} … "
                f"{layers[-1]}"
            )
    if missing := [name for name in layers if name not in hessians]:
        raise InputError(
            f"hessians: {len(missing)} of {len(layers)} layers have none, {missing[0]} the first; "
            "qjax.hessian.collect(model, tokens) gives all"
        )
    sites = structure(config).sites

    def load(index: int) -> dict[str, Hessian]:
        return {name: hessian_of(hessians[f"layers.{index}.{name}"], f"layers.{index}.{name}") for name in sites}

    return Provided(load, None, ())


def provide(
    store: HessianStore, model: Any, tokens: Any, settings: Mapping[str, Any], mesh: Mesh | None = None
) -> Provided:
    """Collect what the store lacks of what `settings` asks for, over the devices of `mesh`.

    Processes that need the same collection take turns: the first collects, the others find it. Those of one group
    collect together. Raises the errors of the collections.
    """
    who = identity(model.fingerprint["sha256"])
    with turn(store.path / f"{digest([who, tokens.sha256])[:16]}.lock"):
        return _provide(store, model, tokens, settings, mesh)


def _provide(store: HessianStore, model: Any, tokens: Any, settings: Mapping[str, Any], mesh: Mesh | None) -> Provided:
    batch = min(settings["batch"], tokens.sequences)
    sketch = _sketch(settings)
    if settings.get("sequences") is not None:
        tokens = _first(tokens, settings["sequences"], "hessian.sequences")
    who = identity(model.fingerprint["sha256"])
    keys: list[str] = []

    def moments() -> Loader:
        key = store.key(who, tokens.sha256, "input", batch)
        keys.append(key)
        with Progress("hessians", model.config.num_layers) as progress:
            return store.collect(
                key,
                model.config,
                model.params,
                tokens.tokens,
                batch=batch,
                progress=lambda done, total: progress.update(done),
                mesh=mesh,
            )

    estimator = estimator_of(settings)
    if estimator.collects:
        return _own(store, model, tokens, estimator, store.key(who, tokens.sha256, estimator.text(), batch), mesh)
    original = settings["stream"] == "original"
    if sketch is None:
        return Provided(moments() if original else None, None, tuple(keys))
    by_moment = settings["input"] == "moment"
    needed = moments() if sketch.estimator == "sketch_a" or (by_moment and original) else None
    key = store.key(who, tokens.sha256, sketch.text(), batch)
    keys.append(key)
    budget = settings["budget_gb"] * 1e9
    work = len(sketch.passes) * len(ranges(model.config, budget)) * tokens.sequences
    prefixes = {
        size: store.key(who, _first(tokens, size, "hessian.prefixes").sha256, sketch.text(), batch)
        for size in settings.get("prefixes") or ()
    }
    with Progress("sketch", work) as progress:
        load = collect_into(
            store,
            key,
            model.config,
            model.params,
            tokens.tokens,
            sketch,
            batch=batch,
            budget=budget,
            checkpoint=settings["checkpoint_s"],
            moments=needed,
            prefixes=prefixes,
            progress=lambda done, total: progress.update(done),
            mesh=mesh,
        )
    if not by_moment:
        return Provided(load, None, tuple(keys))
    if needed is None or not original:
        return Provided(None, load, tuple(keys))

    def mixed(index: int) -> dict[str, Hessian]:
        outputs = load(index)
        return {name: dataclasses.replace(h, output=outputs[name].output) for name, h in needed(index).items()}

    return Provided(mixed, None, tuple(keys))


def _own(store: HessianStore, model: Any, tokens: Any, estimator: Estimator, key: str, mesh: Mesh | None) -> Provided:
    """What an estimator of a user's own collects, kept in the store as all others."""
    blocks = range(model.config.num_layers)
    if not on_primary(lambda: all(store.whole(key, index) for index in blocks)):
        with Progress(estimator.name, len(blocks)) as progress:
            found = estimator.collect(
                model, tokens.tokens, progress=lambda done, total: progress.update(done), mesh=mesh
            )
        load = given(found, model.config).hessians
        assert load is not None
        for index in blocks:
            on_primary(functools.partial(store.save, key, index, load(index)))
    return Provided(store.loader(key), None, (key,))


def _first(tokens: Any, count: int, what: str) -> Any:
    """The stream of the first `count` sequences."""
    if not 0 < count <= tokens.sequences:
        raise InputError(
            f"{what} has {count} and there are {tokens.sequences} calibration sequences; it takes 1 to "
            f"{tokens.sequences}, or raise data.calibration_sequences"
        )
    return TokenStream.of(tokens.tokens[:count], {**tokens.description, "first": count})


def fits(
    store: HessianStore, model: Any, tokens: Any, settings: Mapping[str, Any], source: Provided
) -> dict[str, Fit] | None:
    """The fit of the factors to the Fisher matrices on the first `fit_sequences` of `tokens`; kept in the store.

    None when no fit is asked for. `tokens` must not be what the factors were collected from.
    Raises InputError for more sequences than there are, and the errors of `qjax.hessian.fit.measure_fit`.
    """
    count = settings["fit_sequences"]
    if not count:
        return None
    if count > tokens.sequences:
        raise InputError(
            f"hessian.fit_sequences is {count} and there are {tokens.sequences} evaluation sequences; "
            f"use at most that, or a larger data.evaluation_sequences"
        )
    assert source.hessians is not None
    batch = min(settings["batch"], count // 2)
    what = {"keys": source.keys, "tokens": tokens.sha256, "sequences": count, "batch": batch}
    file = store.path / source.keys[-1] / f"fit_{digest(what)[:16]}.json"
    found = on_primary(lambda: _fits(file, model, tokens.tokens[:count], source.hessians, batch))
    return {name: Fit(**entry) for name, entry in found.items()}


def _fits(file: Path, model: Any, tokens: Any, hessians: Any, batch: int) -> dict[str, Any]:
    """The fits in the file, measured first where it is absent or damaged."""
    try:
        return read_json(file)
    except (ArtifactError, FileNotFoundError):
        pass
    with Progress("fit", len(tokens)) as progress:
        measured = measure_fit(
            model.config,
            model.params,
            tokens,
            hessians,
            batch=batch,
            progress=lambda done, total: progress.update(done),
        )
    found = {name: dataclasses.asdict(fit) for name, fit in measured.items()}
    write_json(file, found)
    return found
