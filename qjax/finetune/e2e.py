"""End-to-end tuning of a quantised model from settings: targets, view, loop, report.

Sources: QuIP# (2402.04396), section 5; QTIP (2406.11235).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qjax.data import TokenStream
from qjax.errors import InputError
from qjax.finetune import latent, lora
from qjax.finetune.edges import by_name
from qjax.finetune.loop import Options, Result, Step, Task, tune
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Trainable, merged, tunable, view
from qjax.finetune.rules import RateRule, assign
from qjax.finetune.sharding import Parts, check_mesh, placing
from qjax.finetune.targets import targets
from qjax.linalg.prng import root_key
from qjax.models import Model
from qjax.models.transformer import head
from qjax.runtime.mesh import fetched
from qjax.runtime.monitor import peak_memory_bytes
from qjax.training.checkpoint import Checkpoints

__all__ = ["Settings", "Tuned", "end_to_end", "movement"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of end-to-end tuning; `configs/finetune/e2e.yaml` explains and sets them.

    Attributes:
      tokens: tokens that are read, over all epochs.
      sequences: different windows; None takes all there are.
      validation: further windows that choose the best.
      topk: likeliest tokens of the teacher that count, None for all.
      qat: tune the original weights, rounded in every pass, instead of what surrounds the codes.
    """

    rules: tuple[RateRule, ...]
    tokens: int
    sequences: int | None = None
    validation: int = 8
    batch: int = 4
    accumulate: int = 1
    topk: int | None = None
    optimizer: Mapping[str, float] = dataclasses.field(default_factory=dict)
    loss: str = "kl"
    dtype: str = "float32"
    remat: bool = True
    chunk: int = 512
    validate_every: int = 10
    checkpoint_every: int = 10
    lora: Mapping[str, Any] | None = None
    qat: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """From plain values, `name` left out. Raises InputError for options that do not exist or are out of range."""
        values = {key: value for key, value in options.items() if key != "name"}
        known = {field.name for field in dataclasses.fields(cls)}
        if surplus := sorted(set(values) - known):
            raise InputError(f"finetune has no option {', '.join(surplus)}; its options are {', '.join(sorted(known))}")
        settings = cls(**{**values, "rules": RateRule.several(values.get("rules", ()))})
        for name in ("tokens", "validation", "batch", "accumulate"):
            if getattr(settings, name) < 1:
                raise InputError(f"finetune.{name} is {getattr(settings, name)}; it must be at least 1")
        if settings.topk is not None and settings.topk < 1:
            raise InputError(f"finetune.topk is {settings.topk}; at least 1, or null for all tokens")
        if settings.lora is not None and (set(settings.lora) - {"rank", "alpha", "pattern"}):
            raise InputError(f"finetune.lora has the options rank, alpha and pattern; found {dict(settings.lora)}")
        settings.options()
        unknown = set(settings.optimizer) - {field.name for field in dataclasses.fields(Optimizer)} | (
            {"steps"} & set(settings.optimizer)
        )
        if unknown:
            raise InputError(f"finetune.optimizer has no option {', '.join(sorted(unknown))}")
        return settings

    def options(self) -> Options:
        """The static choices of a step."""
        return Options(self.loss, self.remat, self.chunk, self.dtype)

    def windows(self) -> int | None:
        """The number of windows that the text must give, validation included."""
        return None if self.sequences is None else self.sequences + self.validation


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The tuned model and what `results.json` says about its tuning."""

    params: Any
    report: dict[str, Any]


def movement(start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By kind of parameter (the last part of its name): how many there are, and how far they went.

    `rms_change` is `‖end − start‖ / ‖start‖`, `max_change` the largest single difference.
    """
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, value in start.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append((fetched(value), np.asarray(end[name])))
    report = {}
    for kind, pairs in sorted(kinds.items()):
        before, after = (np.concatenate([np.ravel(pair[i]) for pair in pairs]).astype(np.float64) for i in range(2))
        report[kind] = {
            "parameters": int(before.size),
            "rms_change": float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-30)),
            "max_change": float(np.max(np.abs(after - before))),
        }
    return report


def _digest(settings: Settings, model: Trainable, fingerprint: str, tokens: TokenStream, seed: int) -> str:
    hasher = hashlib.sha256(json.dumps([repr(settings), fingerprint, tokens.sha256, seed]).encode())
    for name, value in sorted(model.tuned.items()):
        hasher.update(name.encode() + fetched(value).tobytes() + model.rates[name].tobytes())
    return hasher.hexdigest()


def end_to_end(
    reference: Model,
    params: Any,
    tokens: TokenStream,
    settings: Settings,
    *,
    seed: int,
    identity: str,
    cache: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    on_plan: Callable[[int], None] = lambda steps: None,
    on_teacher: Callable[[int, int], None] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    mesh: Mesh | None = None,
) -> Tuned:
    """Tune the quantised `params` towards `reference` on `tokens`, whose last `settings.validation` windows validate.

    Args:
      identity: names the reference and whatever else decides its states, for the cache.
      folder: of checkpoints; a killed run with the same folder continues to the same result.
      mesh: devices of its axis "data" share out parameters, optimiser state and batches (`qjax.finetune.sharding`); a
        run that was killed may continue on another number of them.
      on_plan: called with the number of steps.
      on_teacher: blocks done.
      on_step: after every step.
    Raises InputError for rules that leave parameters uncovered or too few windows, RunError for another run's folder.
    """
    windows, held = tokens.tokens[: -settings.validation], tokens.tokens[-settings.validation :]
    steps = settings.tokens // (settings.batch * settings.accumulate * tokens.length)
    optimizer = Optimizer(steps=steps, **settings.optimizer)
    if settings.lora is not None:
        params = lora.adapted(params, root_key(seed), **settings.lora)
    if settings.qat:
        params = latent.rounding_latents(params, reference.params)
    names = tunable(params)
    if mesh is not None:
        check_mesh(mesh, settings.batch)
    model = view(params, assign(settings.rules, names), placing(mesh))
    found: dict[str, np.ndarray] = {}
    if settings.loss == "kl":
        found = targets(
            reference.params,
            tokens.tokens,
            reference.config,
            model_fingerprint=identity,
            batch=8,
            topk=settings.topk,
            cache=cache,
            progress=on_teacher,
        )
    teacher, parts = by_name(head(reference.params)) if "states" in found else None, None
    if mesh is not None:
        named = {f"teacher.{name}": value for name, value in (teacher or {}).items()}
        parts = Parts.of({**model.tuned, **model.frozen, **named}, mesh)
        if teacher is not None:
            teacher = {name.removeprefix("teacher."): value for name, value in parts.placed(named).items()}
    task = Task(
        config=reference.config,
        model=model,
        optimizer=optimizer,
        options=settings.options(),
        tokens=windows,
        validation=held,
        targets=(
            {name: value[: len(windows)] for name, value in found.items()},
            {name: value[len(windows) :] for name, value in found.items()},
        ),
        teacher=teacher,
        batch=settings.batch,
        accumulate=settings.accumulate,
        seed=seed,
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every,
        parts=parts,
    )
    on_plan(steps)
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder, _digest(settings, model, identity, tokens, seed))
    try:
        result = tune(task, checkpoints, on_step)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    tuned = merged(params, model.layout, result.tuned)
    if settings.lora is not None:
        tuned = lora.filled(tuned, model.layout, result.tuned)
    if settings.qat:
        tuned = latent.closed(tuned, model.layout, result.tuned)
    return Tuned(tuned, _report(result, task, len(names)))


def _report(result: Result, task: Task, names: int) -> dict[str, Any]:
    first = result.history[0][2]
    best = min(entry[2] for entry in result.history)
    return {
        "steps": task.optimizer.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "tokens": result.tokens,
        "windows": len(task.tokens),
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "validation_before": first,
        "validation_after": best,
        "parameters_tuned": sum(int(np.size(value)) for value in task.model.tuned.values()),
        "parameters_named": names,
        "moved": movement(task.model.tuned, result.tuned),
        "history": result.history,
    }
