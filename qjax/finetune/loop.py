"""Tune a model to the end of a schedule: batches, validation, the best so far, checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qjax.errors import InputError
from qjax.finetune.checkpoint import Checkpoints
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Trainable
from qjax.finetune.sharding import Parts, check_mesh
from qjax.finetune.step import Options, train_step, validation_step
from qjax.models.config import ModelConfig
from qjax.runtime.mesh import fetched

__all__ = ["Options", "Result", "Step", "Task", "tune", "windows_at"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is tuned on what.

    Attributes:
      tokens: windows `[n, length]` to tune on.  validation: windows that choose the best.
      targets: for "kl": of both, `{"states": [n, length, width]}` (the teacher before its final norm) or
        `{"index", "log_p"}` `[n, length, k]`; pairs (tuning, validation).
      teacher: for "kl" with states: the arrays of the teacher's `transformer.head`, by name.
      batch: windows per gradient.  accumulate: gradients per step.  seed: of the order of the windows.
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
class Step:
    """After a step; `validation` where it was computed. The loss is a mean over positions, in nats."""

    step: int
    steps: int
    loss: float
    validation: float | None
    seconds: float


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


def windows_at(position: int, count: int, windows: int, seed: int) -> Int[np.ndarray, " count"]:
    """Indices `position … position + count` of an endless reading in which every epoch is shuffled anew.

    Philox's raw output is stable over numpy versions, permutations made from it are not promised.
    """
    found = []
    for index in range(position, position + count):
        epoch, place = divmod(index, windows)
        found.append(_order(seed, epoch, windows)[place])
    return np.array(found, np.int64)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> np.ndarray:
    raw = np.asarray(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(windows))
    return np.argsort(raw, kind="stable")


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
def _initial(tuned: Any, optimizer: Optimizer, parts: Parts) -> Any:
    """The optimiser's state in parts, never whole on one device."""
    return parts.kept(optimizer.init(tuned))


def tune(
    task: Task, checkpoints: Checkpoints | None = None, report: Callable[[Step], None] = lambda step: None
) -> Result:
    """Run the task, or continue it from the newest checkpoint to the same result.

    A loss or gradient that is not finite ends the run early: `stopped` names the step, the best so far is returned.
    """
    optimizer, model = task.optimizer, task.model
    tuned = _copied(dict(model.tuned))  # the step donates its buffers
    if task.parts is None:
        state: Any = {"tuned": tuned, "optimizer": optimizer.init(tuned)}
    else:
        state = {"tuned": tuned, "optimizer": _initial(tuned, optimizer, task.parts)}
    best: Any = fetched(tuned)
    log: dict[str, Any] = {"step": 0, "recent": [], "history": [], "best": 0, "stopped": None, "seconds": 0.0}
    found = None if checkpoints is None else checkpoints.restore({"state": state, "best": tuned})
    if found is not None:
        state, best, log = found[0]["state"], fetched(found[0]["best"]), found[1]
    begun, before = time.monotonic(), log["seconds"]

    def keep() -> None:
        log["seconds"] = before + time.monotonic() - begun
        if checkpoints is not None:
            checkpoints.save(log["step"], {"state": state, "best": best}, log)

    if not log["history"]:
        log["history"].append([0, None, validation_loss(task, state["tuned"])])
        if not math.isfinite(log["history"][0][2]):
            log["stopped"] = f"step 0: the validation loss is {log['history'][0][2]} before any tuning"
    while log["step"] < optimizer.steps and log["stopped"] is None:
        step = log["step"] + 1
        tokens, targets = _batch(task, log["step"] * task.batch * task.accumulate)
        state, loss, norm = train_step(
            state,
            model.frozen,
            model.rates,
            tokens,
            targets,
            task.teacher,
            layout=model.layout,
            config=task.config,
            options=task.options,
            optimizer=optimizer,
            parts=task.parts,
        )
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            log["stopped"] = (
                f"step {step}: the loss is {loss} and its gradient's norm {norm}; the best parameters, of step "
                f"{log['best']}, are kept; use lower rates or a smaller clip"
            )
            break
        log["step"] = step
        log["recent"].append(loss)
        validation = None
        if step % task.validate_every == 0 or step == optimizer.steps:
            validation = validation_loss(task, state["tuned"])
            log["history"].append([step, float(np.mean(log["recent"])), validation])
            log["recent"] = []
            if validation <= min(entry[2] for entry in log["history"]):
                log["best"], best = step, fetched(state["tuned"])
        log["seconds"] = before + time.monotonic() - begun
        if step % task.checkpoint_every == 0 or step == optimizer.steps:
            keep()
        report(Step(step, optimizer.steps, loss, validation, log["seconds"]))
    per_step = task.batch * task.accumulate * task.tokens.shape[1]
    return Result(best, log["best"], log["history"], log["stopped"], log["step"] * per_step, log["seconds"])
