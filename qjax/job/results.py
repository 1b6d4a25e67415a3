"""The contents of `results.json`: sizes, losses, error bounds, and the circumstances it was made in."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from qjax import data, models
from qjax.hessian.fit import Fit, error_bound, predicted_cost
from qjax.job.tuning import stored_bits, whole_model_bytes
from qjax.matrix.quantize import MatrixReport
from qjax.models.checkpoints.weights import stored_bytes
from qjax.pipeline.quantize_model import QuantizedModel
from qjax.runtime.fingerprint import device, versions
from qjax.runtime.monitor import CompileCounter, Stopwatch, device_peak_memory_bytes, peak_memory_bytes

__all__ = ["bound", "circumstances", "finite", "losses", "sizes"]


def sizes(files: models.ModelFiles, quantized: QuantizedModel) -> dict[str, Any]:
    """Bits per quantised weight, and the bytes of the whole model: as its files hold it, and as it is stored now."""
    weights = [math.prod(report.shape) for report in quantized.reports]
    bits = stored_bits(quantized.params)
    return {
        "bits_per_weight": bits / sum(weights),
        "quantized_weights": sum(weights),
        "whole_model_bytes": whole_model_bytes(quantized.params),
        "whole_model_bytes_reference": stored_bytes(files.weights, files.config),
    }


def losses(reports: list[MatrixReport]) -> dict[str, Any]:
    """Means and extremes over the matrices."""
    mean = lambda name: sum(getattr(report, name) for report in reports) / len(reports)  # noqa: E731
    worst = max(reports, key=lambda report: report.proxy_loss)
    passes = {}
    if all(report.proxy_loss_before_passes is not None for report in reports):
        passes = {"proxy_loss_mean_before_passes": mean("proxy_loss_before_passes")}
    counts = [report.tokens for report in reports if report.tokens is not None]
    experts = {"expert_tokens_least": min(counts)} if counts else {}
    return {
        **passes,
        **experts,
        "matrices": len(reports),
        "proxy_loss_mean": mean("proxy_loss"),
        "proxy_loss_worst": worst.proxy_loss,
        "proxy_loss_worst_layer": worst.name,
        "weight_mse_mean": mean("weight_mse"),
        "damping_max": max(report.damping for report in reports),
        "dead_columns": sum(report.dead_columns for report in reports),
        "fallbacks": [report.name for report in reports if report.fallback is not None],
    }


def bound(reports: list[MatrixReport], measured: Mapping[str, Fit]) -> dict[str, Any]:
    """The end-to-end error bound of every matrix as it was quantised, before any tuning (see `error_bound`)."""
    layers = {}
    for report in (report for report in reports if report.name in measured):  # not embedding and head
        fit = measured[report.name]
        bound = error_bound(fit, report.squared_error, report.kronecker_loss)
        cost = predicted_cost(fit, report.kronecker_loss)
        layers[report.name] = {**dataclasses.asdict(fit), "nats_per_token": bound, "predicted_nats_per_token": cost}
    total = lambda name: sum(layer[name] for layer in layers.values())  # noqa: E731
    return {
        "nats_per_token": total("nats_per_token"),
        "predicted_nats_per_token": total("predicted_nats_per_token"),
        "cosine_mean": sum(layer["cosine"] for layer in layers.values()) / len(layers),
        "layers": layers,
    }


def circumstances(
    settings: Mapping[str, Any],
    source: str,
    model: models.Model,
    tokens: data.TokenSplit,
    watch: Stopwatch,
    compiles: CompileCounter,
) -> dict[str, Any]:
    """Model, settings, data, time, memory, programs, versions and device."""
    return {
        "model": {
            "name": model.name,
            "description": model.description,
            "source": source,
            "fingerprint": model.fingerprint,
        },
        "settings": dict(settings),
        "tokens_calibration": int(tokens.calibration.tokens.size),
        "calibration": tokens.calibration.description,
        "evaluation": tokens.evaluation.description,
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "stages": watch.stages,
        "compiled_programs": compiles.count,
        "compiled_program_names": compiles.programs,
        "peak_memory_bytes": peak_memory_bytes(),
        "device_peak_memory_bytes": device_peak_memory_bytes(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "device": device(),
    }


def finite(value: Any) -> Any:
    """JSON has no infinity: a hopeless model's perplexity becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
