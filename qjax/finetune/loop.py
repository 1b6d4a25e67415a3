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
from jaxtyping import Array, Int

from qjax.errors import InputError
from qjax.finetune.checkpoint import Checkpoints
from qjax.finetune.losses import KINDS, chunked_mean, next_token, soft_targets, topk_targets
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Layout, Trainable, hidden
from qjax.models import transformer
from qjax.models.config import ModelConfig

__all__ = ["Options", "Result", "Step", "Task", "batch_loss", "tune", "windows_at"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices of the step; hashable.

    Attributes:
      loss: "kl" to the teacher, or "next_token".  remat: compute blocks again in the backward pass.
      chunk: positions whose logits exist at a time.  dtype: of the activations.
    """

    loss: str = "kl"
    remat: bool = True
    chunk: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.loss not in KINDS:
            raise InputError(f"finetune.loss is {self.loss!r}; there is: {', '.join(KINDS)}")
        if self.dtype not in ("float32", "bfloat16") or self.chunk < 1:
            raise InputError(
                f"finetune: dtype {self.dtype!r}, chunk {self.chunk}; dtype is float32 or bfloat16, chunk at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """What is tuned on what.

    Attributes:
      tokens: windows `[n, length]` to tune on.  validation: windows that choose the best.
      targets: for "kl": of both, `{"states": [n, length, width]}` (the teacher before its final norm) or
        `{"index", "log_p"}` `[n, length, k]`; pairs (tuning, validation).
      teacher: for "kl" with states: the teacher's `transformer.head`.
      batch: windows per gradient.  accumulate: gradients per step.  seed: of the order of the windows.
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

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"finetune.{name} is {getattr(self, name)}; it must be at least 1")
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


def _own_head(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Names of the arrays of the last step."""
    return {"norm": "norm", "head": "head" if "head" in arrays else "embed"}


def batch_loss(
    tuned: Mapping[str, Any],
    frozen: Mapping[str, Any],
    tokens: Int[Array, "batch length"],
    targets: Mapping[str, Any],
    teacher: Any,
    layout: Layout,
    config: ModelConfig,
    options: Options,
) -> Array:
    """Mean loss in nats over all positions of the windows but the last of each."""
    arrays = {**frozen, **tuned}
    if options.dtype != "float32":
        arrays["embed"] = arrays["embed"].astype(options.dtype)
    x = hidden(arrays, layout, tokens, config, options.remat)
    width = x.shape[-1]
    flat = x[:, :-1].reshape(-1, width).astype(jnp.float32)
    names = _own_head({**frozen, **tuned})
    moving = {part: tuned[name] for part, name in names.items() if name in tuned}
    fixed = {part: frozen[name] for part, name in names.items() if name in frozen}
    positions = {name: value[:, :-1].reshape(flat.shape[0], -1) for name, value in targets.items()}
    if options.loss == "next_token":
        positions = {"token": tokens[:, 1:].reshape(-1, 1)}

    def per_position(head: Any, x: Array, target: Any, constants: Any) -> Array:
        own = transformer.logits({**constants["own"], **head}, x[None], config)[0]
        if options.loss == "next_token":
            return next_token(own, target["token"][:, 0])
        if "index" in target:
            return topk_targets(own, target["index"], target["log_p"].astype(jnp.float32))
        states = target["states"].astype(jnp.float32)
        return soft_targets(own, transformer.logits(constants["teacher"], states[None], config)[0])

    return chunked_mean(per_position, options.chunk, moving, flat, positions, {"own": fixed, "teacher": teacher})


@functools.partial(jax.jit, static_argnames=("layout", "config", "options"))
def _validate(tuned, frozen, tokens, targets, teacher, layout, config, options) -> Array:  # type: ignore[no-untyped-def]
    return batch_loss(tuned, frozen, tokens, targets, teacher, layout, config, options)


@functools.partial(jax.jit, static_argnames=("layout", "config", "options", "optimizer"), donate_argnums=(0,))
def train_step(
    state: Any,
    frozen: Mapping[str, Any],
    rates: Mapping[str, Any],
    tokens: Int[Array, "accumulate batch length"],
    targets: Mapping[str, Any],
    teacher: Any,
    *,
    layout: Layout,
    config: ModelConfig,
    options: Options,
    optimizer: Optimizer,
) -> tuple[Any, Array, Array]:
    """One update: (new state, loss before it, norm of the gradient). The old state's buffers are donated."""
    loss = functools.partial(batch_loss, layout=layout, config=config, options=options)

    def accumulate(total: Any, part: Any) -> tuple[Any, None]:
        value, gradient = jax.value_and_grad(loss)(state["tuned"], frozen, part[0], part[1], teacher)
        return jax.tree.map(jnp.add, total, (value, gradient)), None

    if tokens.shape[0] == 1:
        value, gradient = jax.value_and_grad(loss)(
            state["tuned"], frozen, tokens[0], {name: leaf[0] for name, leaf in targets.items()}, teacher
        )
    else:
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state["tuned"]))
        (value, gradient), _ = jax.lax.scan(accumulate, zero, (tokens, targets))
        value, gradient = jax.tree.map(lambda leaf: leaf / np.float32(tokens.shape[0]), (value, gradient))
    tuned, inner, norm = optimizer.update(gradient, state["optimizer"], state["tuned"], rates)
    return {"tuned": tuned, "optimizer": inner}, value, norm


def validation_loss(task: Task, tuned: Mapping[str, Any]) -> float:
    """Mean loss over the validation windows."""
    batch = math.gcd(len(task.validation), task.batch)
    total = 0.0
    for start in range(0, len(task.validation), batch):
        rows = slice(start, start + batch)
        targets = {name: np.ascontiguousarray(value[rows]) for name, value in task.targets[1].items()}
        total += float(
            _validate(
                tuned,
                task.model.frozen,
                task.validation[rows],
                targets,
                task.teacher,
                layout=task.model.layout,
                config=task.config,
                options=task.options,
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


def tune(
    task: Task, checkpoints: Checkpoints | None = None, report: Callable[[Step], None] = lambda step: None
) -> Result:
    """Run the task, or continue it from the newest checkpoint to the same result.

    A loss or gradient that is not finite ends the run early: `stopped` names the step, the best so far is returned.
    """
    optimizer, model = task.optimizer, task.model
    tuned = _copied(dict(model.tuned))  # the step donates its buffers
    state: Any = {"tuned": tuned, "optimizer": optimizer.init(tuned)}
    best: Any = jax.device_get(tuned)
    log: dict[str, Any] = {"step": 0, "recent": [], "history": [], "best": 0, "stopped": None, "seconds": 0.0}
    found = None if checkpoints is None else checkpoints.restore({"state": state, "best": tuned})
    if found is not None:
        state, best, log = found[0]["state"], jax.device_get(found[0]["best"]), found[1]
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
                log["best"], best = step, jax.device_get(state["tuned"])
        log["seconds"] = before + time.monotonic() - begun
        if step % task.checkpoint_every == 0 or step == optimizer.steps:
            keep()
        report(Step(step, optimizer.steps, loss, validation, log["seconds"]))
    per_step = task.batch * task.accumulate * task.tokens.shape[1]
    return Result(best, log["best"], log["history"], log["stopped"], log["step"] * per_step, log["seconds"])
