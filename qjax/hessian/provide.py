"""Where a run's Hessians come from: the settings of the `hessian` group, made into loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qjax.errors import InputError
from qjax.hessian.collect import ESTIMATORS
from qjax.hessian.sketch import Sketch
from qjax.hessian.sketch_collect import ranges
from qjax.hessian.sketch_store import collect_into
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import HessianStore, identity
from qjax.run.progress import Progress

__all__ = ["Provided", "check_settings", "provide"]

Loader = Callable[[int], dict[str, Hessian]]


@dataclasses.dataclass(frozen=True)
class Provided:
    """Loaders by block index.

    Attributes:
      hessians: everything from the store, or None when the input factors are made block by block.
      outputs: the output factors in that case, or None.
      keys: the addresses in the store.
    """

    hessians: Loader | None
    outputs: Loader | None
    keys: tuple[str, ...]


def _sketch(settings: Mapping[str, Any]) -> Sketch | None:
    if settings["estimator"] == "input":
        return None
    return Sketch(settings["estimator"], settings["rounds"], settings["labels"], settings["seed"])


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises InputError for a `hessian` group that says something impossible."""
    if settings["estimator"] not in ESTIMATORS:
        raise InputError(f"hessian.estimator is {settings['estimator']!r}; there are: {', '.join(ESTIMATORS)}")
    if _sketch(settings) is None:
        return
    if settings["input"] not in ("sketch", "moment"):
        raise InputError(f"hessian.input is {settings['input']!r}; allowed are sketch and moment")
    if settings["input"] == "sketch" and settings["stream"] != "original":
        raise InputError(
            f"hessian.stream is {settings['stream']!r} and a sketch's input factor is of the original model; "
            "use hessian.input=moment, or hessian.stream=original"
        )
    for name in ("budget_gb", "checkpoint_s"):
        if not settings[name] > 0:
            raise InputError(f"hessian.{name} is {settings[name]}; it is positive")


def provide(store: HessianStore, model: Any, tokens: Any, settings: Mapping[str, Any]) -> Provided:
    """Collect what the store lacks of what `settings` asks for. Raises the errors of the collections."""
    batch = min(settings["batch"], tokens.sequences)
    sketch = _sketch(settings)
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
            )

    original = settings["stream"] == "original"
    if sketch is None:
        return Provided(moments() if original else None, None, tuple(keys))
    by_moment = settings["input"] == "moment"
    needed = moments() if sketch.estimator == "sketch_a" or (by_moment and original) else None
    key = store.key(who, tokens.sha256, sketch.text(), batch)
    keys.append(key)
    budget = settings["budget_gb"] * 1e9
    work = len(sketch.passes) * len(ranges(model.params["blocks"], budget)) * tokens.sequences
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
            progress=lambda done, total: progress.update(done),
        )
    if not by_moment:
        return Provided(load, None, tuple(keys))
    if needed is None or not original:
        return Provided(None, load, tuple(keys))

    def mixed(index: int) -> dict[str, Hessian]:
        outputs = load(index)
        return {name: dataclasses.replace(h, output=outputs[name].output) for name, h in needed(index).items()}

    return Provided(mixed, None, tuple(keys))
