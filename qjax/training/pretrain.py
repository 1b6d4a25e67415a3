"""Train to the end of a schedule with checkpoints, so that a killed run continues to the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from orbax.checkpoint import v1 as ocp

from qjax.errors import InputError, NumericsError, RunError
from qjax.models.config import ModelConfig
from qjax.runtime.lock import RunLock
from qjax.training.step import Schedule, TrainState, batch_at, initial_state, sum_loss, train_step

__all__ = ["Progress", "Result", "Task", "held_out_loss", "train"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what; everything that decides the result is in here.

    Attributes:
      stream: training tokens.  held_out: windows `[n, context + 1]` that choose the best checkpoint.
      batch: windows per step.  seed: of the initial weights and of the order of the windows.
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


@dataclasses.dataclass(frozen=True)
class Progress:
    """After a step. `held_out` is the loss on the held-out windows where it was computed, in nats per token."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    seconds: float
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The parameters with the lowest held-out loss, and how training went.

    Attributes:
      history: `[step, mean training loss since the last entry, held-out loss]` of every evaluation, in nats per token.
      seconds: of training and evaluation, over all resumed parts.
    """

    params: Any
    best_step: int
    history: list[list[int | float]]
    seconds: float


def held_out_loss(params: Any, windows: Int[np.ndarray, "windows context_plus_1"], config: ModelConfig) -> float:
    """Mean nats per predicted token; the sums of equal batches are added in float64."""
    batch = math.gcd(len(windows), 16)
    total = sum(float(sum_loss(params, part, config)) for part in windows.reshape(-1, batch, windows.shape[1]))
    return total / (len(windows) * (windows.shape[1] - 1))


def train(
    task: Task, folder: Path, checkpoint_every: int, report: Callable[[Progress], None] = lambda progress: None
) -> Result:
    """Run or continue `task` in `folder` and return its best parameters.

    Raises RunError when `folder` holds another task or is in use, NumericsError naming the step where the loss or the
    gradient is not finite (the best checkpoint stays in `folder`).
    """
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
    with RunLock(folder):
        _check_fingerprint(folder, task)
        # Two checkpoints are kept: the newest is complete before the one before it goes.
        keep: Any = ocp.training.preservation_policies.LatestN(2)
        path = str((folder / "checkpoints").absolute())
        with ocp.training.Checkpointer(path, preservation_policy=keep, cleanup_tmp_directories=True) as store:
            return _train(task, store, checkpoint_every, report)


def _train(
    task: Task, store: ocp.training.Checkpointer, checkpoint_every: int, report: Callable[[Progress], None]
) -> Result:
    schedule = task.schedule
    state = initial_state(jax.random.key(task.seed), task.config, schedule)
    best = jax.device_get(state.params)  # on the host, because the state's buffers are donated
    # `recent` holds the training losses since the last evaluation; `position` is the data position in windows.
    log: dict[str, Any] = {"step": 0, "position": 0, "recent": [], "history": [], "best": 0, "seconds": 0.0}
    if store.latest is not None:
        state, best, log = _restore(store, store.latest.step, state)
    begun, before, first = time.monotonic(), log["seconds"], log["step"]
    for step in range(first + 1, schedule.steps + 1):
        tokens = batch_at(task.stream, log["position"], task.batch, task.context, task.seed, task.first_token)
        state, loss, norm = train_step(state, tokens, task.config, schedule)
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"step {step}: the training loss is {loss} and its gradient's norm {norm}; the best parameters so far, "
                f"of step {log['best']}, are in {store.directory}; start a new out with a lower schedule.learning_rate"
            )
        log["step"], log["position"] = step, log["position"] + task.batch
        log["recent"].append(loss)
        held_out = None
        if step % task.evaluate_every == 0 or step == schedule.steps:
            held_out = held_out_loss(state.params, task.held_out, task.config)
            log["history"].append([step, float(np.mean(log["recent"])), held_out])
            log["recent"] = []
            if held_out <= min(entry[2] for entry in log["history"]):
                log["best"], best = step, jax.device_get(state.params)
        log["seconds"] = before + time.monotonic() - begun
        if step % checkpoint_every == 0 or log["best"] == step or step == schedule.steps:
            _save(store, state, best, log)
        left = (schedule.steps - step) * (time.monotonic() - begun) / (step - first)
        report(Progress(step, schedule.steps, loss, held_out, log["seconds"], left))
    return Result(best, log["best"], log["history"], log["seconds"])


def _save(store: ocp.training.Checkpointer, state: TrainState, best: Any, log: dict[str, Any]) -> None:
    try:
        store.save(log["step"], {"state": state, "best": best}, force=True, custom_metadata=log)
    except OSError as error:
        raise RunError(f"step {log['step']} cannot be saved in {store.directory}: {error}; make room") from error


def _restore(store: ocp.training.Checkpointer, step: int, like: TrainState) -> tuple[TrainState, Any, dict[str, Any]]:
    def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    saved: Any = store.load(step, jax.tree.map(abstract, {"state": like, "best": like.params}))
    log: Any = store.metadata(step).custom_metadata
    return saved["state"], jax.device_get(saved["best"]), dict(log)


def _check_fingerprint(folder: Path, task: Task) -> None:
    path = folder / "fingerprint.json"
    if path.exists():
        found = json.loads(path.read_text())["task"]
        if found != task.fingerprint:
            raise RunError(
                f"{folder} holds a run of another configuration or text ({found[:12]}, this one is "
                f"{task.fingerprint[:12]}); choose another out, or remove it to start again"
            )
        return
    staging = path.with_suffix(".tmp")
    staging.write_text(json.dumps({"task": task.fingerprint}) + "\n")
    staging.replace(path)
