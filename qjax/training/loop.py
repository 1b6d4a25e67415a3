"""Steps to the end of a schedule: validation, the best parameters so far, checkpoints, an early end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qjax.runtime.mesh import fetched
from qjax.training.checkpoint import Checkpoints

__all__ = ["Plan", "Result", "Step", "run_steps"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """When things happen, in steps.

    Attributes:
      steps: of the whole run.
      validate_every: steps between validations; the last step has one.
      checkpoint_every: steps between checkpoints; the last step has one.
      validate_first: whether the parameters are validated before the first step.
      keep_best: whether a step with the least validation loss so far is a checkpoint too.
      advice: the end of the message about a loss that is not finite.
    """

    steps: int
    validate_every: int
    checkpoint_every: int
    validate_first: bool
    keep_best: bool
    advice: str


@dataclasses.dataclass(frozen=True)
class Step:
    """After a step; `validation` where it was computed. Losses are means over positions, in nats."""

    step: int
    steps: int
    loss: float
    validation: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The parameters with the least validation loss, and how the run went.

    Attributes:
      params: on the host.
      history: `[step, mean training loss since the last entry (None at the start), validation loss]`.
      stopped: None, or at which step and why the run ended early.
      steps: that were run.
      seconds: over all resumed parts.
    """

    params: Any
    best_step: int
    history: list[list[Any]]
    stopped: str | None
    steps: int
    seconds: float


def run_steps(
    state: Any,
    params: Callable[[Any], Any],
    step: Callable[[Any, int], tuple[Any, Any, Any]],
    validation: Callable[[Any], float],
    plan: Plan,
    checkpoints: Checkpoints | None = None,
    report: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Run the plan from `state`, or continue it from the newest checkpoint to the same result.

    A loss or gradient that is not finite ends the run early: `stopped` names the step, the best so far is returned.

    Args:
      params: of a state; what is validated and kept.
      step: `(state, steps before) -> (new state, loss, norm of the gradient)`; it may donate the state's buffers.
      validation: the loss of parameters.
    """
    best: Any = fetched(params(state))
    log: dict[str, Any] = {"step": 0, "recent": [], "history": [], "best": 0, "stopped": None, "seconds": 0.0}
    found = None if checkpoints is None else checkpoints.restore({"state": state, "best": params(state)})
    if found is not None:
        state, best, log = found[0]["state"], fetched(found[0]["best"]), found[1]
    begun, before = time.monotonic(), log["seconds"]
    if plan.validate_first and not log["history"]:
        log["history"].append([0, None, validation(params(state))])
        if not math.isfinite(log["history"][0][2]):
            log["stopped"] = f"step 0: the validation loss is {log['history'][0][2]} before any step"
    while log["step"] < plan.steps and log["stopped"] is None:
        number = log["step"] + 1
        state, loss, norm = step(state, log["step"])
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            log["stopped"] = (
                f"step {number}: the loss is {loss} and its gradient's norm {norm}; the best parameters, of step "
                f"{log['best']}, are kept; {plan.advice}"
            )
            break
        log["step"], last = number, number == plan.steps
        log["recent"].append(loss)
        measured, is_best = None, False
        if number % plan.validate_every == 0 or last:
            measured = validation(params(state))
            log["history"].append([number, float(np.mean(log["recent"])), measured])
            log["recent"] = []
            is_best = measured <= min(entry[2] for entry in log["history"])
            if is_best:
                log["best"], best = number, fetched(params(state))
        log["seconds"] = before + time.monotonic() - begun
        if checkpoints is not None and (number % plan.checkpoint_every == 0 or last or (is_best and plan.keep_best)):
            checkpoints.save(number, {"state": state, "best": best}, log)
        report(Step(number, plan.steps, loss, measured, log["seconds"]))
    return Result(best, log["best"], log["history"], log["stopped"], log["step"], log["seconds"])
