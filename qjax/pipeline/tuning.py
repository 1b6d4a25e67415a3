"""Tuning of a whole quantised model by the options of the `finetune` group, with its progress."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from qjax.data.stream import TokenStream
from qjax.errors import InputError
from qjax.finetune import Step, Tuned, TuningMethod, method_of
from qjax.models.edges import edge_operators
from qjax.models.loading import Model
from qjax.runtime.fingerprint import identity
from qjax.runtime.progress import Progress

__all__ = ["check_edges", "check_tuning", "tuned"]

_log = logging.getLogger("qjax")


def check_tuning(options: Mapping[str, Any] | None, hessian: Mapping[str, Any]) -> None:
    """Raises InputError for options that are out of range, or do not go with those of the Hessians."""
    method = None if options is None else method_of(options)
    if method is not None and method.while_rounding and hessian["stream"] != "original":
        raise InputError(
            f"finetune={method.name} needs hessian=original (as preset=quip_sharp and qtip have); found the stream "
            f"{hessian['stream']!r}"
        )


def check_edges(params: Any, method: TuningMethod) -> None:
    """Raises InputError for a quantised embedding or head, which no method tunes or computes gradients through."""
    if outside := edge_operators(params):
        raise InputError(
            f"finetune={method.name}: {' and '.join(outside)} of this model is quantised, and tuning keeps embedding "
            "and head as arrays; tune a model without rules for embed and head"
        )


def tuned(
    model: Model,
    params: Any,
    tokens: TokenStream,
    method: TuningMethod,
    *,
    seed: int,
    cache: pathlib.Path | None = None,
    folder: pathlib.Path | None = None,
    label: str = "tune",
    on_step: Callable[[Step], None] = lambda step: None,
    mesh: Mesh | None = None,
) -> Tuned:
    """Tune the quantised `params` of the reference `model` on `tokens`.

    Args:
      method: of the `finetune` group.
      cache: keeps the reference's states between runs.
      folder: keeps checkpoints.
      label: of the progress.
      mesh: its axis "data" shares out parameters and batches, None is one device.

    Raises InputError for a model whose embedding or head is quantised.
    """
    check_edges(params, method)
    with contextlib.ExitStack() as stack:
        shown: list[Progress] = []

        def on_teacher(done: int, total: int) -> None:
            if done == 1:
                shown.append(stack.enter_context(Progress("teacher", total)))
            shown[-1].update(done)

        def on_plan(steps: int) -> None:
            stack.close()
            shown.append(stack.enter_context(Progress(label, steps)))

        def stepped(step: Step) -> None:
            progress = shown[-1]
            if progress.done == 0 and step.step > 1:  # resumed: the steps before do not count for the time left
                stack.close()
                shown.append(stack.enter_context(Progress(label, step.steps, done=step.step - 1)))
            known = "" if step.validation is None else f", validation {step.validation:.4f}"
            shown[-1].update(step.step, note=f"loss {step.loss:.4f}{known}")
            on_step(step)

        found = method.tune(
            model,
            params,
            tokens,
            seed=seed,
            identity=identity(model.fingerprint["sha256"]),
            cache=cache,
            folder=folder,
            on_plan=on_plan,
            on_teacher=on_teacher,
            on_step=stepped,
            mesh=mesh,
        )
    if found.report["stopped"] is not None:
        print(f"fine-tuning stopped early at {found.report['stopped']}", flush=True)
        _log.warning("fine-tuning stopped early at %s", found.report["stopped"])
    return found
