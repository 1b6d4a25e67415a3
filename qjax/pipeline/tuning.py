"""Tuning of a whole quantised model by the options of the `finetune` group, with its progress."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from qjax.data.stream import TokenStream
from qjax.errors import InputError
from qjax.finetune import BlockSettings, Settings, Step, Tuned, end_to_end, pv
from qjax.models.loading import Model
from qjax.runtime.fingerprint import identity
from qjax.runtime.progress import Progress

__all__ = ["check_tuning", "settings_of", "tuned"]

_log = logging.getLogger("qjax")


def settings_of(options: Mapping[str, Any]) -> Settings | pv.Settings:
    """The settings of tuning a whole quantised model. Raises InputError for wrong ones."""
    return pv.Settings.of(options) if options["name"] == "pv" else Settings.of(options)


def check_tuning(options: Mapping[str, Any] | None, hessian: Mapping[str, Any]) -> None:
    """Raises InputError for options that are out of range, or do not go with those of the Hessians."""
    if options is None:
        return
    if options["name"] != "block":
        settings_of(options)
        return
    BlockSettings.of(options)
    if hessian["stream"] != "original":
        raise InputError(
            f"finetune=block needs hessian=original (as recipe=quip_sharp and qtip have); found the stream "
            f"{hessian['stream']!r}"
        )


def tuned(
    model: Model,
    params: Any,
    tokens: TokenStream,
    options: Mapping[str, Any],
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
      options: of the `finetune` group.
      cache: keeps the reference's states between runs.
      folder: keeps checkpoints.
      label: of the progress.
      mesh: its axis "data" shares out parameters and batches, None is one device.
    """
    settings = settings_of(options)
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

        run: Any = functools.partial(end_to_end, mesh=mesh)
        if isinstance(settings, pv.Settings):
            if mesh is not None:
                raise InputError("finetune=pv runs on one device; use mesh.data=1 mesh.model=1")
            run = pv.alternate
        found: Tuned = run(
            model,
            params,
            tokens,
            settings,
            seed=seed,
            identity=identity(model.fingerprint["sha256"]),
            cache=cache,
            folder=folder,
            on_plan=on_plan,
            on_teacher=on_teacher,
            on_step=stepped,
        )
    if found.report["stopped"] is not None:
        print(f"fine-tuning stopped early at {found.report['stopped']}", flush=True)
        _log.warning("fine-tuning stopped early at %s", found.report["stopped"])
    return found
