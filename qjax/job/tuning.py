"""Fine-tuning inside a run: text, tracker and files around `qjax.pipeline.tuning`."""

from __future__ import annotations

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
from qjax.models.edges import edge_operators
from qjax.pipeline.tuning import tuned
from qjax.runtime.tracker import Tracker

__all__ = [
    "finetune_model",
    "recovered",
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

    def on_step(step: Step) -> None:
        tracker.log({"finetune/loss": step.loss, "finetune/validation": step.validation}, step=step.step)
        _log.info("%s", step)

    return tuned(
        model,
        params,
        tokens.calibration,
        method,
        seed=seed,
        cache=cache / "teachers",
        folder=out / "finetune",
        label=f"tune {out.name}",
        on_step=on_step,
        mesh=mesh,
    )


def recovered(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """`(p_before − p_after) / (p_before − p_reference)`: the share of the lost perplexity that tuning brought back.

    Above 1 for a model that became better than the original; None where nothing was lost.
    """
    lost = before["perplexity"] - before["perplexity_reference"]
    return (before["perplexity"] - after["perplexity"]) / lost if 0 < lost < float("inf") else None


def stored_bits(params: Any) -> int:
    """Bits of all operators, without shared tables and the adapters that are stored apart."""
    outside = edge_operators(params).values()
    return sum(operator.stored_bits for operator in outside) + sum(
        operator.stored_bits for block in params["blocks"] for operator in operators(block).values()
    )


def whole_model_bytes(params: Any) -> int:
    """Bytes of all parameters as stored, adapters included."""
    return artifact.model_bytes(lora.summed(params))
