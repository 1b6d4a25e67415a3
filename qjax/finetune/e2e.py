"""End-to-end tuning of a quantised model from settings: targets, view, loop, report.

Sources: QuIP# (2402.04396), section 5; QTIP (2406.11235).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from qjax.data import TokenStream
from qjax.finetune import latent, lora
from qjax.finetune.edges import by_name
from qjax.finetune.loop import Options, Result, Step, Task, tune
from qjax.finetune.lora import Adapters
from qjax.finetune.methods import TUNINGS, Tuned, TuningMethod
from qjax.finetune.optimizer import Schedule
from qjax.finetune.parameters import Trainable, merged, tunable, view
from qjax.finetune.rules import RateRule, assign
from qjax.finetune.sharding import Parts, check_mesh, placing
from qjax.finetune.targets import targets
from qjax.linalg.prng import root_key
from qjax.models import Model
from qjax.models.transformer import head
from qjax.registry import Count, OneOf
from qjax.runtime.mesh import fetched
from qjax.runtime.monitor import peak_memory_bytes
from qjax.training.checkpoint import Checkpoints

__all__ = ["EndToEnd", "end_to_end", "movement"]


@TUNINGS.register("e2e")
@dataclasses.dataclass(frozen=True)
class EndToEnd(TuningMethod):
    """End-to-end tuning towards the original model's distributions: gains (real-valued SU, SV), norms; codes stay.

    Sources: QuIP# (2402.04396), section 5; QTIP (2406.11235).

    Attributes:
      loss: "kl" is KL(original ‖ quantised), "next_token" the cross entropy of the text.
      tokens: tokens that are read, over all epochs.
      sequences: different windows of the text; None takes all there are.
      validation: further windows, which choose the best step.
      batch: windows per gradient.
      accumulate: gradients per step.
      topk: likeliest tokens of the original that count, the rest as one; None counts all, exactly.
      rules: learning rates by parameter, ordered, the first match wins; rate None freezes, and a parameter that no rule
        covers is an error. Names: layers.3.self_attn.q_proj.input_gain, .output_gain, .scaling.relative (scales in the
        rotated basis), layers.3.input_layernorm, norm, embed (with tied embeddings also the head), head, table.0 (HYB's
        or the random code's table). Scales and tables make every step decode.
      optimizer: AdamW on a cosine.
      dtype: of activations; bfloat16 for accelerators.
      remat: compute blocks again in the backward pass instead of keeping their activations.
      chunk: positions whose logits exist at a time.
      validate_every: steps between validations.
      checkpoint_every: steps between checkpoints; a killed run continues from the last one.
    """

    name: ClassVar[str] = "e2e"
    loss: Annotated[str, OneOf("kl", "next_token")] = "kl"
    tokens: Count = 131072
    sequences: Count | None = None
    validation: Count = 8
    batch: Count = 4
    accumulate: Count = 1
    topk: Count | None = None
    rules: tuple[RateRule, ...] = (
        RateRule(r"_gain$", 2.0e-3),
        RateRule(r"norm(\.\w+)?$", 2.0e-3),
        RateRule(".", None),
    )
    optimizer: Schedule = dataclasses.field(default_factory=Schedule)
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    remat: bool = True
    chunk: Count = 512
    validate_every: Count = 10
    checkpoint_every: Count = 10

    @property
    def adapters(self) -> Adapters | None:
        """The low-rank adapters that are tuned; None where there are none."""
        return None

    def options(self) -> Options:
        """The static choices of a step."""
        return Options(self.loss, self.remat, self.chunk, self.dtype)

    def windows(self) -> int | None:
        """The number of windows that the text must give, validation included."""
        return None if self.sequences is None else self.sequences + self.validation

    def tune(self, reference: Model, params: Any, tokens: TokenStream, **given: Any) -> Tuned:
        """As `end_to_end`."""
        return end_to_end(reference, params, tokens, self, **given)


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


def _digest(settings: EndToEnd, model: Trainable, fingerprint: str, tokens: TokenStream, seed: int) -> str:
    hasher = hashlib.sha256(json.dumps([repr(settings), fingerprint, tokens.sha256, seed]).encode())
    for name, value in sorted(model.tuned.items()):
        hasher.update(name.encode() + fetched(value).tobytes() + model.rates[name].tobytes())
    return hasher.hexdigest()


def end_to_end(
    reference: Model,
    params: Any,
    tokens: TokenStream,
    settings: EndToEnd,
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
    optimizer = settings.optimizer.over(steps)
    if settings.adapters is not None:
        params = lora.adapted(params, root_key(seed), **dataclasses.asdict(settings.adapters))
    if settings.tunes_weights:
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
    if settings.adapters is not None:
        tuned = lora.filled(tuned, model.layout, result.tuned)
    if settings.tunes_weights:
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


@TUNINGS.register("lora")
@dataclasses.dataclass(frozen=True)
class LowRankAdapters(EndToEnd):
    """Low-rank adapters over frozen codes of any codebook, which the backward pass decodes again.

    They are saved beside the artifact. Source: ModuLoRA (2309.16119).

    Attributes:
      lora: rank and scale of the adapters, and the quantised layers that get them.
    """

    name: ClassVar[str] = "lora"
    loss: Annotated[str, OneOf("kl", "next_token")] = "next_token"
    tokens: Count = 65536
    rules: tuple[RateRule, ...] = (RateRule(r"lora_[ab]$", 1.0e-3), RateRule(".", None))
    optimizer: Schedule = dataclasses.field(default_factory=lambda: Schedule(eps=1.0e-8))
    lora: Adapters = dataclasses.field(default_factory=Adapters)

    @property
    def adapters(self) -> Adapters | None:
        """Those of the option `lora`."""
        return self.lora


@TUNINGS.register("qat")
@dataclasses.dataclass(frozen=True)
class QuantisationAware(EndToEnd):
    """Quantisation-aware training to compare with: the original weights, rounded in every pass to a scalar grid.

    Straight-through, on e2e's tokens. Scales stay those of the quantisation that it starts from; the artifact has
    ordinary codes. Names of rules: layers.3.mlp.up_proj.latent (weights in the rotated basis), norms, embed, head.
    """

    name: ClassVar[str] = "qat"
    tunes_weights: ClassVar[bool] = True
    rules: tuple[RateRule, ...] = (
        RateRule(r"latent$", 1.0e-4),
        RateRule(r"norm(\.\w+)?$", 1.0e-3),
        RateRule(".", None),
    )
