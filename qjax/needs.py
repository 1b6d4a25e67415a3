"""What the stages of a job need, from its settings: the arguments of the estimate in `qjax.preflight`."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from qjax import data, models
from qjax.finetune.rules import RateRule
from qjax.preflight import (
    Estimate,
    Extra,
    activation_streams,
    estimate,
    place_activations,
    sketch_needs,
    tuning_needs,
)

__all__ = ["estimated", "place"]

_TOGETHER = ("e2e", "lora", "qat", "pv")  # tuning of the whole model at once


def estimated(
    *,
    model: Mapping[str, Any],
    hessian: Mapping[str, Any],
    finetune: Mapping[str, Any],
    config: models.ModelConfig,
    plans: Mapping[str, Any],
    tokens: data.TokenSplit,
    streamed: bool,
) -> Estimate:
    """The estimate of a job with these groups of settings."""
    batch = min(hessian["batch"], tokens.calibration.sequences)
    length = tokens.calibration.length
    extra = Extra()
    if hessian["estimator"] != "input":
        extra = sketch_needs(config, batch=batch, length=length, budget=hessian["budget_gb"] * 1e9)
    if finetune["name"] in _TOGETHER:
        tuning = _tuning(finetune, config, length)
        extra = Extra(max(extra.memory, tuning.memory), extra.disk + tuning.disk)
    return estimate(
        config,
        plans,
        bytes_per_parameter=4 if model["dtype"] == "float32" else 2,
        calibration=tokens.calibration.tokens.shape,
        evaluation=tokens.evaluation.tokens.shape,
        batch=batch,
        stored_hessians=hessian["stream"] == "original",
        streamed=streamed,
        streams=activation_streams(hessian["stream"], finetune["name"] == "block"),
        extra=extra,
    )


def _tuning(finetune: Mapping[str, Any], config: models.ModelConfig, length: int) -> Extra:
    rules = RateRule.several(finetune.get("rules", ()))
    moves = lambda name: next((rule.rate for rule in rules if re.search(rule.pattern, name)), None)  # noqa: E731
    windows = finetune.get("sequences")
    if windows is None:  # a text may have more windows than one epoch reads; their targets are made all the same
        windows = -(-finetune["tokens"] // length)
    rank = (finetune.get("lora") or {}).get("rank", 0)
    latent = finetune["name"] in ("qat", "pv")  # a latent weight, or its gradient, is as large as the matrix
    return tuning_needs(
        config,
        batch=finetune["batch"],
        length=length,
        windows=(windows + finetune["validation"]) * (finetune["loss"] == "kl"),
        chunk=finetune["chunk"],
        rank=config.hidden_size if latent else rank,
        dense=bool(moves("embed") or moves("head")),
        topk=finetune.get("topk"),
    )


def place(
    need: Estimate, out: pathlib.Path, memory: Mapping[str, Any], finetune: Mapping[str, Any], devices: int = 1
) -> str:
    """Where the activations lie by the budgets `memory`. Raises RunError as `place_activations`.

    Block-wise tuning draws windows at random, and several devices take theirs from the host: not on the device.
    """
    return place_activations(
        need,
        out,
        host_gb=memory["host_gb"],
        device_gb=memory.get("device_gb"),
        disk_gb=memory["disk_gb"],
        on_device=finetune["name"] != "block" and devices == 1,
    )
