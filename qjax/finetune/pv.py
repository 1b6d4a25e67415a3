"""PV-style tuning: gains and norms by gradient descent, then a few codes by a step of their own, in turns.

Source: PV-Tuning (2405.14852). Its P step is end-to-end tuning; its V step moves the tiles with the largest gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.data import TokenStream
from qjax.errors import InputError
from qjax.finetune import latent
from qjax.finetune.discrete import downhill, inner, largest, moved, smoothness, tiled
from qjax.finetune.e2e import EndToEnd, end_to_end
from qjax.finetune.edges import by_name
from qjax.finetune.loop import Step
from qjax.finetune.lora import mapped
from qjax.finetune.methods import TUNINGS, Tuned
from qjax.finetune.parameters import Trainable, layer_value, tunable, view
from qjax.finetune.step import batch_loss
from qjax.finetune.targets import targets
from qjax.models import Model
from qjax.models.transformer import head
from qjax.registry import Count, Range
from qjax.training.order import windows_at

__all__ = ["PV", "Problem", "alternate", "move_codes"]

_TRIES = 6  # subspaces, each a quarter of the one before
_PROBE = 1e-2  # the gradient's change is measured over a step of this share of the values' length


@TUNINGS.register("pv")
@dataclasses.dataclass(frozen=True)
class PV(EndToEnd):
    """PV-style tuning of any codebook: gains and norms as in e2e, in turns with steps that move a few of the codes.

    Source: PV-Tuning (2405.14852).

    Attributes:
      rounds: parts of continuous tuning, which share the tokens; codes move between two of them.
      share: of the tiles of every matrix, those with the largest gradient, that may move in a step; a quarter of them,
        and so on, where the loss does not fall.
      batches: batches whose mean gradient decides.
    """

    name: ClassVar[str] = "pv"
    one_device: ClassVar[bool] = True
    tunes_weights: ClassVar[bool] = True  # for a moment: the gradient of a matrix is as large
    rounds: Annotated[int, Range("a number of rounds, at least 2", 2)] = 4
    share: Annotated[float, Range("a share, greater than 0 and at most 1", 0, 1, low_open=True)] = 0.01
    batches: Count = 8

    @property
    def continuous(self) -> EndToEnd:
        """The end-to-end tuning of all rounds together."""
        return EndToEnd(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EndToEnd)})

    def tune(self, reference: Model, params: Any, tokens: TokenStream, **given: Any) -> Tuned:
        """As `alternate`. Raises InputError for a mesh."""
        if given.pop("mesh", None) is not None:
            raise InputError("finetune=pv runs on one device; use mesh.data=1 mesh.model=1")
        return alternate(reference, params, tokens, self, **given)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The loss of a model as a function of its latents: mean over `parts`, pairs (tokens, targets) of equal shape."""

    model: Trainable
    parts: list[tuple[Any, Any]]
    teacher: Any
    static: Mapping[str, Any]

    def value(self, latents: Mapping[str, Any]) -> float:
        """The loss."""
        run = functools.partial(_value, **self.static)
        return float(np.mean([float(run(latents, self.model.frozen, *part, self.teacher)) for part in self.parts]))

    def gradient(self, latents: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The loss and its gradient."""
        total: Any = None
        for part in self.parts:
            found = _gradient(latents, self.model.frozen, *part, self.teacher, **self.static)
            total = found if total is None else _sum(total, found)
        value, gradient = _scaled(total, np.float32(1 / len(self.parts)))
        return float(value), gradient


@functools.partial(jax.jit, static_argnames=("layout", "config", "options"))
def _value(latents, frozen, tokens, targets, teacher, *, layout, config, options):  # type: ignore[no-untyped-def]
    return batch_loss(latents, frozen, tokens, targets, teacher, layout, config, options)


@functools.partial(jax.jit, static_argnames=("layout", "config", "options"))
def _gradient(latents, frozen, tokens, targets, teacher, *, layout, config, options):  # type: ignore[no-untyped-def]
    return jax.value_and_grad(batch_loss)(latents, frozen, tokens, targets, teacher, layout, config, options)


@functools.partial(jax.jit, donate_argnums=(0,))
def _sum(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


@functools.partial(jax.jit, donate_argnums=(0,))
def _scaled(tree: Any, factor: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * factor, tree)


@jax.jit
def _along(latents: Any, direction: Any, length: Any) -> tuple[Any, Any]:
    """(latents + c·direction, c) with `‖c·direction‖ = length · ‖latents‖`."""
    factor = length * jnp.sqrt(inner(latents, latents) / jnp.maximum(inner(direction, direction), 1e-30))
    return jax.tree.map(lambda x, d: x + factor * d, latents, direction), factor


@jax.jit
def _curvature(direction: Any, before: Any, after: Any, factor: Any) -> Any:
    return smoothness(direction, jax.tree.map(lambda a, b: (a - b) / factor, after, before))


@functools.partial(jax.jit, static_argnames=("count",))
def _chosen(base: Any, gradient: Any, count: int) -> Any:
    return largest(gradient, base.codebook.tile, count)


@jax.jit
def _downhill(base: Any, gradient: Any, index: Any, kept: Any) -> Any:
    return downhill(gradient, base.codebook.tile, index, kept)


@jax.jit
def _moved(base: Any, gradient: Any, rate: Any, index: Any, kept: Any) -> tuple[Any, Any, Any]:
    """(packed codes, their values, how many tiles have another code)."""
    codes = base.codebook.unpack(base.packed, base.transform.padded)
    values = base.codewords()
    new = moved(codes, values, gradient, rate, index, kept, base.scaling, base.codebook)
    after = base.scaling.from_codebook_units(base.codebook.dequantize(new))
    changed = jnp.any(tiled(after, base.codebook.tile) != tiled(values, base.codebook.tile), axis=(1, 2))
    return base.codebook.pack(new), after, jnp.sum(changed)


def move_codes(params: Any, problem_of: Callable[[Trainable], Problem], share: float) -> tuple[Any, dict[str, Any]]:
    """The quantised model after one discrete step, if that lowers the loss, and what happened.

    The largest-gradient `share` of the tiles of every matrix make the subspace S; with its smoothness L_S the step is
    `x − ∇φ / L_S` on S, rounded. Where nothing moves or the loss on the same batches is not lower, a quarter of the
    tiles with their own L_S are tried, and so on; in the end none move.
    """
    opened = latent.opened(params)
    names = tunable(opened)
    model = view(opened, {name: float(name.endswith(".latent")) for name in names})
    problem = problem_of(model)
    before, gradient = problem.gradient(model.tuned)
    slope = jax.device_get(gradient)
    bases: dict[str, Any] = {}
    mapped(params, lambda name, weight: bases.setdefault(name, weight))
    bases = {name: base for name, base in bases.items() if f"{name}.latent" in names}

    def of(arrays: Mapping[str, Any], name: str) -> Any:
        return layer_value(arrays, model.layout, f"{name}.latent")

    indices = {}
    for name, base in bases.items():
        tiles = math.prod(base.transform.padded) // math.prod(base.codebook.tile)
        indices[name] = _chosen(base, of(slope, name), max(1, round(share * tiles)))
    report: dict[str, Any] = {"loss_before": before, "loss_after": before, "tiles_changed": 0, "tries": 0}
    for power in range(_TRIES):
        kept = {name: np.int32(max(1, len(index) >> 2 * power)) for name, index in indices.items()}
        direction = {name: np.zeros(np.shape(value), np.float32) for name, value in model.tuned.items()}
        for name, base in bases.items():
            of(direction, name)[:] = np.asarray(_downhill(base, of(slope, name), indices[name], kept[name]))
        ahead, factor = _along(model.tuned, direction, np.float32(_PROBE))
        curvature = float(_curvature(direction, gradient, problem.gradient(ahead)[1], factor))
        del ahead, direction
        report |= {"tries": power + 1, "smoothness": curvature, "tiles_chosen": int(sum(kept.values()))}
        if not curvature > 0:
            continue  # no step length follows from a gradient that falls along its own direction
        found, latents = {}, {name: np.array(value) for name, value in model.tuned.items()}
        for name, base in bases.items():
            rate = np.float32(1 / curvature)
            packed, after, count = _moved(base, of(slope, name), rate, indices[name], kept[name])
            found[name] = (packed, int(count))
            of(latents, name)[:] = np.asarray(after)
        changed = sum(count for _, count in found.values())
        after = problem.value(latents) if changed else before
        if after < before:
            new = mapped(params, lambda name, w, f=found: w.replace(packed=f[name][0]) if name in f else w)
            return new, {**report, "loss_after": after, "tiles_changed": changed}
    return params, report


def alternate(
    reference: Model,
    params: Any,
    tokens: TokenStream,
    settings: PV,
    *,
    seed: int,
    identity: str,
    cache: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    on_plan: Callable[[int], None] = lambda steps: None,
    on_teacher: Callable[[int, int], None] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Tuned:
    """As `end_to_end`, in `settings.rounds` parts with a step of the codes between two.

    A killed run repeats the steps of codes that it had made, from the checkpoints of the parts before them.
    """
    base = settings.continuous
    part = dataclasses.replace(base, tokens=base.tokens // settings.rounds)
    windows = tokens.tokens[: -base.validation]
    reports, moves = [], []
    for index in range(settings.rounds):
        tuned = end_to_end(
            reference,
            params,
            tokens,
            part,
            seed=(seed + index) % 2**32,
            identity=identity,
            cache=cache,
            folder=None if folder is None else folder / f"round-{index}",
            on_plan=on_plan,
            on_teacher=on_teacher,
            on_step=on_step,
        )
        params = tuned.params
        reports.append(tuned.report)
        if tuned.report["stopped"] is not None or index == settings.rounds - 1:
            break
        rows = windows_at(index * settings.batches * base.batch, settings.batches * base.batch, len(windows), seed)
        batches = np.asarray(windows[rows]).reshape(settings.batches, base.batch, -1)

        def problem_of(model: Trainable, batches: np.ndarray = batches) -> Problem:
            return _problem(reference, model, batches, base)

        params, report = move_codes(params, problem_of, settings.share)
        moves.append(report)
    return Tuned(params, _together(reports, moves))


def _problem(reference: Model, model: Trainable, batches: np.ndarray, settings: EndToEnd) -> Problem:
    config = reference.config
    found: dict[str, np.ndarray] = {}
    if settings.loss == "kl":
        flat = batches.reshape(-1, batches.shape[-1])
        found = targets(reference.params, flat, config, model_fingerprint="", batch=8, topk=settings.topk)
    parts = [
        (batches[i], {name: value.reshape(*batches.shape[:2], *value.shape[1:])[i] for name, value in found.items()})
        for i in range(len(batches))
    ]
    static = {"layout": model.layout, "config": config, "options": settings.options()}
    return Problem(model, parts, by_name(head(reference.params)) if "states" in found else None, static)


def _together(reports: list[dict[str, Any]], moves: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all parts, as `end_to_end` makes them; `rounds` and `moves` have the single ones."""
    last = reports[-1]
    return {
        **last,
        "steps": sum(report["steps"] for report in reports),
        "best_step": sum(report["steps"] for report in reports[:-1]) + last["best_step"],
        "tokens": sum(report["tokens"] for report in reports),
        "seconds": round(sum(report["seconds"] for report in reports), 3),
        "validation_before": reports[0]["validation_before"],
        "rounds": [{key: report[key] for key in ("validation_before", "validation_after")} for report in reports],
        "moves": moves,
    }
