"""Training of a model from random weights on a text, with checkpoints: a killed run continues to the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from qjax.errors import InputError, NumericsError
from qjax.models.config import ModelConfig
from qjax.runtime.lock import RunLock
from qjax.training.checkpoint import Checkpoints
from qjax.training.loop import Plan, Result, Step, run_steps
from qjax.training.step import Schedule, TrainState, batch_at, initial_state, sum_loss, train_step

__all__ = ["Task", "held_out_loss", "train"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A training: model, text and schedule, everything that decides the result.

    Attributes:
      stream: training tokens.
      held_out: windows `[n, context + 1]` that choose the best checkpoint.
      batch: windows per step.
      seed: of the initial weights and of the order of the windows.
      first_token: the token that begins a text.
    """

    config: ModelConfig
    schedule: Schedule
    stream: Int[np.ndarray, " tokens"]
    held_out: Int[np.ndarray, "windows context_plus_1"]
    batch: int
    seed: int
    first_token: int
    evaluate_every: int

    def __post_init__(self) -> None:
        for name in ("batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.schedule.warmup < self.schedule.steps:
            raise InputError(
                f"schedule.warmup is {self.schedule.warmup}; it must lie between 0 and schedule.steps = "
                f"{self.schedule.steps}"
            )

    @property
    def context(self) -> int:
        """Predicted positions of a window."""
        return self.held_out.shape[1] - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every field."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in fields.items() if isinstance(v, np.ndarray)}
        tables = {"config": dataclasses.asdict(self.config), "schedule": dataclasses.asdict(self.schedule)}
        return hashlib.sha256(json.dumps(fields | arrays | tables, sort_keys=True).encode()).hexdigest()


def held_out_loss(params: Any, windows: Int[np.ndarray, "windows context_plus_1"], config: ModelConfig) -> float:
    """Mean nats per predicted token; the sums of equal batches are added in float64."""
    batch = math.gcd(len(windows), 16)
    total = sum(float(sum_loss(params, part, config)) for part in windows.reshape(-1, batch, windows.shape[1]))
    return total / (len(windows) * (windows.shape[1] - 1))


def train(
    task: Task, folder: Path, checkpoint_every: int, report: Callable[[Step], None] = lambda step: None
) -> Result:
    """Run or continue `task` in `folder`: its best parameters, in nats per token of the held-out windows.

    A step with the least held-out loss so far is a checkpoint too. Raises RunError when `folder` holds another task or
    is in use, NumericsError naming the step where the loss or the gradient is not finite.
    """
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    kept = folder / "checkpoints"
    plan = Plan(
        steps=task.schedule.steps,
        validate_every=task.evaluate_every,
        checkpoint_every=checkpoint_every,
        validate_first=False,
        keep_best=True,
        advice=f"they are in {kept}; start a new out with a lower schedule.learning_rate",
    )

    def step(state: TrainState, before: int) -> tuple[TrainState, Any, Any]:
        position = before * task.batch
        tokens = batch_at(task.stream, position, task.batch, task.context, task.seed, task.first_token)
        return train_step(state, tokens, task.config, task.schedule)

    with RunLock(folder):
        checkpoints = Checkpoints(kept, task.fingerprint, kind="training", remedy="remove it to start again")
        with contextlib.closing(checkpoints):
            result = run_steps(
                initial_state(jax.random.key(task.seed), task.config, task.schedule),
                lambda state: state.params,
                step,
                lambda params: held_out_loss(params, task.held_out, task.config),
                plan,
                checkpoints,
                report,
            )
    if result.stopped is not None:
        raise NumericsError(result.stopped)
    return result
