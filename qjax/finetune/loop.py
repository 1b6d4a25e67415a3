"""Tuning of a model to the end of a schedule: its batches, its step, its validation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qjax.errors import InputError
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Trainable
from qjax.finetune.sharding import Parts, check_mesh
from qjax.finetune.step import Options, train_step, validation_step
from qjax.models.config import ModelConfig
from qjax.training.checkpoint import Checkpoints
from qjax.training.loop import Plan, Step, run_steps
from qjax.training.order import windows_at

__all__ = ["Options", "Result", "Step", "Task", "tune"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A tuning: the model, its text and targets, the schedule.

    Attributes:
      tokens: windows `[n, length]` to tune on.
      validation: windows that choose the best.
      targets: for "kl": of both, `{"states": [n, length, width]}` (the teacher before its final norm) or
        `{"index", "log_p"}` `[n, length, k]`; pairs (tuning, validation).
      teacher: for "kl" with states: the arrays of the teacher's `transformer.head`, by name.
      batch: windows per gradient.
      accumulate: gradients per step.
      seed: of the order of the windows.
      parts: how `model` and `teacher` lie on a mesh, None on one device.
    """

    config: ModelConfig
    model: Trainable
    optimizer: Optimizer
    options: Options
    tokens: Int[np.ndarray, "windows length"]
    validation: Int[np.ndarray, "held length"]
    targets: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
    teacher: Any
    batch: int
    accumulate: int
    seed: int
    validate_every: int
    checkpoint_every: int
    parts: Parts | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"finetune.{name} is {getattr(self, name)}; it must be at least 1")
        if self.parts is not None:
            check_mesh(self.parts.mesh, self.batch)
        if len(self.tokens) < self.batch * self.accumulate or len(self.validation) < 1:
            raise InputError(
                f"finetune: {len(self.tokens)} windows to tune on and {len(self.validation)} to validate on; a step "
                f"takes {self.batch * self.accumulate}: ask for more sequences, or a smaller batch"
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """The tuned parameters with the least validation loss, and how the run went.

    Attributes:
      history: `[step, mean training loss since the last entry (None at the start), validation loss]`.
      stopped: None, or at which step and why the run ended early.
      seconds: over all resumed parts.
    """

    tuned: Mapping[str, Any]
    best_step: int
    history: list[list[Any]]
    stopped: str | None
    tokens: int
    seconds: float


def validation_loss(task: Task, tuned: Mapping[str, Any]) -> float:
    """Mean loss over the validation windows."""
    batch = math.gcd(len(task.validation), task.batch)
    total = 0.0
    for start in range(0, len(task.validation), batch):
        rows = slice(start, start + batch)
        targets = {name: np.ascontiguousarray(value[rows]) for name, value in task.targets[1].items()}
        total += float(
            validation_step(
                tuned,
                task.model.frozen,
                task.validation[rows],
                targets,
                task.teacher,
                layout=task.model.layout,
                config=task.config,
                options=task.options,
                parts=task.parts,
            )
        )
    return total * batch / len(task.validation)


def _batch(task: Task, position: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = windows_at(position, task.batch * task.accumulate, len(task.tokens), task.seed)
    rows = rows.reshape(task.accumulate, task.batch)
    return task.tokens[rows], {name: value[rows] for name, value in task.targets[0].items()}


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, static_argnames=("optimizer", "parts"))
def _initial_in_parts(tuned: Any, optimizer: Optimizer, parts: Parts) -> Any:
    """The optimiser's state in parts, never whole on one device."""
    return parts.kept(optimizer.init(tuned))


def _initial_state(task: Task) -> dict[str, Any]:
    tuned = _copied(dict(task.model.tuned))  # the step donates its buffers
    if task.parts is None:
        return {"tuned": tuned, "optimizer": task.optimizer.init(tuned)}
    return {"tuned": tuned, "optimizer": _initial_in_parts(tuned, task.optimizer, task.parts)}


def tune(
    task: Task, checkpoints: Checkpoints | None = None, report: Callable[[Step], None] = lambda step: None
) -> Result:
    """Run the task, or continue it from the newest checkpoint to the same result.

    A loss or gradient that is not finite ends the run early: `stopped` names the step, the best so far is returned.
    """
    model = task.model

    def step(state: Any, before: int) -> tuple[Any, Any, Any]:
        tokens, targets = _batch(task, before * task.batch * task.accumulate)
        return train_step(
            state,
            model.frozen,
            model.rates,
            tokens,
            targets,
            task.teacher,
            layout=model.layout,
            config=task.config,
            options=task.options,
            optimizer=task.optimizer,
            parts=task.parts,
        )

    plan = Plan(
        steps=task.optimizer.steps,
        validate_every=task.validate_every,
        checkpoint_every=task.checkpoint_every,
        validate_first=True,
        keep_best=False,
        advice="use lower rates or a smaller clip",
    )
    validation = functools.partial(validation_loss, task)
    ran = run_steps(_initial_state(task), lambda state: state["tuned"], step, validation, plan, checkpoints, report)
    tokens = ran.steps * task.batch * task.accumulate * task.tokens.shape[1]
    return Result(ran.params, ran.best_step, ran.history, ran.stopped, tokens, ran.seconds)
