"""Fine-tuning inside a run: text, progress, tracker and files around `qjax.finetune`."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from qjax import data
from qjax.finetune import Step, Tuned, TuningMethod, lora
from qjax.interchange import artifact
from qjax.matrix.operator import operators
from qjax.models import Model
from qjax.runtime.distributed import on_primary
from qjax.runtime.fingerprint import identity
from qjax.runtime.progress import Progress
from qjax.runtime.tracker import Tracker

__all__ = [
    "finetune_model",
    "recovered",
    "save_adapters",
    "stored_bits",
    "whole_model_bytes",
]

_log = logging.getLogger("qjax")


def finetune_model(
    model: Model,
    params: Any,
    *,
    method: TuningMethod,
    text: Mapping[str, Any],
    seed: int,
    cache: pathlib.Path,
    out: pathlib.Path,
    tracker: Tracker,
    mesh: Mesh | None = None,
) -> Tuned:
    """Tune the quantised `params` of the reference `model`.

    Args:
      method: of the `finetune` group.
      text: of `qjax.data.load`; its calibration side is tuned on.
      cache: its folder `teachers` keeps the reference's states.
      out: its folder `finetune` keeps checkpoints.
      mesh: its axis "data" shares out parameters and batches, None is one device.
    """
    tokens = data.load(
        tokenizer=model.tokenizer,
        vocab_size=model.config.vocab_size,
        seed=seed,
        **{**text, "calibration_sequences": method.windows()},
    )
    with contextlib.ExitStack() as stack:
        shown: list[Progress] = []

        def on_teacher(done: int, total: int) -> None:
            if done == 1:
                shown.append(stack.enter_context(Progress("teacher", total)))
            shown[-1].update(done)

        def on_plan(steps: int) -> None:
            stack.close()
            shown.append(stack.enter_context(Progress(f"tune {out.name}", steps)))

        def on_step(step: Step) -> None:
            progress = shown[-1]
            if progress.done == 0 and step.step > 1:  # resumed: the steps before do not count for the time left
                stack.close()
                shown.append(stack.enter_context(Progress(f"tune {out.name}", step.steps, done=step.step - 1)))
            known = "" if step.validation is None else f", validation {step.validation:.4f}"
            shown[-1].update(step.step, note=f"loss {step.loss:.4f}{known}")
            tracker.log({"finetune/loss": step.loss, "finetune/validation": step.validation}, step=step.step)
            _log.info("%s", step)

        tuned = method.tune(
            model,
            params,
            tokens.calibration,
            seed=seed,
            identity=identity(model.fingerprint["sha256"]),
            cache=cache / "teachers",
            folder=out / "finetune",
            on_plan=on_plan,
            on_teacher=on_teacher,
            on_step=on_step,
            mesh=mesh,
        )
    if tuned.report["stopped"] is not None:
        print(f"fine-tuning stopped early at {tuned.report['stopped']}", flush=True)
        _log.warning("fine-tuning stopped early at %s", tuned.report["stopped"])
    return tuned


def recovered(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """`(p_before − p_after) / (p_before − p_reference)`: the share of the lost perplexity that tuning brought back.

    Above 1 for a model that became better than the original; None where nothing was lost.
    """
    lost = before["perplexity"] - before["perplexity_reference"]
    return (before["perplexity"] - after["perplexity"]) / lost if 0 < lost < float("inf") else None


def save_adapters(folder: pathlib.Path, params: Any) -> None:
    """`adapters.safetensors` beside `artifact/`, when the model has adapters. All processes of a group call this."""
    if lora.adapters(params):
        file, own = folder / "adapters.safetensors", folder / "artifact"
        on_primary(lambda: lora.save(file, params, artifact.fingerprint(own)["sha256"]))


def stored_bits(params: Any) -> int:
    """Bits of all operators, without shared tables and the adapters that are stored apart."""
    return sum(operator.stored_bits for block in params["blocks"] for operator in operators(block).values())


def whole_model_bytes(params: Any) -> int:
    """Bytes of all parameters as stored, adapters included."""
    return artifact.model_bytes(lora.summed(params))
