"""A whole model, block by block: Hessians, rounding, propagation, with a record of every finished layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qjax.errors import InputError
from qjax.hessian.collect import block_hessians, block_hessians_of_two_streams, embedded, layer_names
from qjax.hessian.statistics import Hessian
from qjax.hessian.store import forward_block
from qjax.models.config import ModelConfig
from qjax.models.transformer import LINEARS
from qjax.quantize import MatrixReport, quantize_matrix
from qjax.quantized import QuantizedMatrix
from qjax.recipe import LayerPlan, Recipe
from qjax.records import Records
from qjax.rounding.base import Rounding
from qjax.rounding.nearest import Nearest, Stochastic

__all__ = ["STREAMS", "QuantizedModel", "quantize_layer", "quantize_model", "replace_linears", "root_key", "suspicious"]

STREAMS = ("quantized", "original", "corrected")


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """Parameters with `QuantizedMatrix` leaves, and the report of every quantised layer in order."""

    params: Any
    reports: list[MatrixReport]
    incoherence: dict[str, Any]


def quantize_model(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    recipe: Recipe,
    *,
    seed: int,
    stream: str = "quantized",
    hessians: Callable[[int], Mapping[str, Hessian]] | None = None,
    outputs: Callable[[int], Mapping[str, Hessian]] | None = None,
    correction: float = 0.5,
    records: Records | None = None,
    batch: int = 8,
    on_layer: Callable[[MatrixReport, bool], None] | None = None,
) -> QuantizedModel:
    """Quantise every linear of a model by `recipe`.

    Args:
      tokens: calibration tokens `[sequences, length]`.
      seed: the run's root seed; every layer's key is derived from it and the layer's name.
      stream: "quantized": block i sees what the quantised blocks before it produce (GPTQ, QuIP); "corrected": the same,
        and its targets make up for what went wrong before it, by the share `correction` (see `qjax.correction`);
        "original": all Hessians come from the unquantised model (QuIP#, QTIP), given by `hessians(block index)`.
      outputs: where the output factors come from when the input factors are made here, block by block.
      records: where finished layers are kept and found again.
      on_layer: called with each layer's report and whether it was found finished.

    Raises InputError for a recipe that does not fit the model, NumericsError as `quantize_matrix`.
    """
    if stream not in STREAMS or (stream == "original") != (hessians is not None):
        raise InputError(
            f"hessian.stream is {stream!r}; allowed are quantized, corrected, and original with stored Hessians"
        )
    plans = recipe.plan(layer_names(config))
    key = root_key(seed)
    z = embedded(params["embed"], tokens, batch) if hessians is None else None  # inputs in the quantised stream
    x = z if stream == "corrected" else None  # inputs in the original model
    blocks, reports = [], []
    for index, parameters in enumerate(params["blocks"]):
        todo: dict[str, LayerPlan] = {}
        done: dict[str, tuple[QuantizedMatrix, MatrixReport]] = {}
        for linear in LINEARS:
            name = f"layers.{index}.{linear}"
            plan = plans[name]
            found = records.load(name) if plan is not None and records is not None else None
            if found is not None:
                done[linear] = found
            elif plan is not None:
                todo[linear] = plan
        block = {}
        if hessians is not None:
            block = hessians(index) if todo else {}
        elif x is not None and z is not None:
            # Also for a finished block: x must come from the same program, for a resumed run to give the same bytes.
            block, x = block_hessians_of_two_streams(parameters, x, z, config, index=index, batch=batch)
        elif z is not None and todo:
            block = block_hessians(parameters, z, config, index=index, batch=batch)
        if outputs is not None and todo:
            factors = outputs(index)
            block = {linear: dataclasses.replace(h, output=factors[linear].output) for linear, h in block.items()}
        for linear in LINEARS:
            if linear in todo:
                plan, name = todo[linear], f"layers.{index}.{linear}"
                matrix, report = quantize_layer(parameters, block[linear], plan, linear, name, key, correction)
                if records is not None:
                    records.save(matrix, report, plan.incoherence.spec())
                done[linear] = matrix, report
            if linear in done:
                reports.append(done[linear][1])
                if on_layer is not None:
                    on_layer(done[linear][1], linear not in todo)
        blocks.append(replace_linears(parameters, {linear: matrix for linear, (matrix, _) in done.items()}))
        if z is not None and index + 1 < config.num_layers:
            z = forward_block(blocks[-1], z, config, batch, None if z is x else z)
    return QuantizedModel({**params, "blocks": blocks}, reports, recipe.incoherence.spec())


def root_key(seed: int) -> jax.Array:
    """`jax.random.key(seed)` without compiling a program."""
    return jax.random.wrap_key_data(jax.device_put(np.array([0, seed], np.uint32)))


def quantize_layer(
    parameters: Any, hessian: Hessian, plan: LayerPlan, linear: str, name: str, key: jax.Array, correction: float
) -> tuple[QuantizedMatrix, MatrixReport]:
    """One linear of a block by its plan.

    Where feedback pushed the error into directions that matter, or lost the matrix, plain rounding is tried as well,
    and kept when it is better; the report says so.
    """
    group, leaf = linear.split(".")

    def by(rounding: Rounding) -> tuple[QuantizedMatrix, MatrixReport]:
        return quantize_matrix(
            parameters[group][leaf]["weight"],
            hessian,
            codebook=plan.codebook,
            rounding=rounding,
            incoherence=plan.incoherence,
            damping=plan.damping,
            scale=plan.scale,
            correction=correction,
            key=key,
            name=name,
        )

    matrix, report = by(plan.rounding)
    if not isinstance(plan.rounding, (Nearest, Stochastic)) and suspicious(report):
        plain, other = by(Nearest())
        if other.proxy_loss < report.proxy_loss:
            return plain, dataclasses.replace(other, fallback="nearest")
    return matrix, report


def suspicious(report: MatrixReport) -> bool:
    """Whether feedback did harm: an error that H sees more than a white one of its size, or one as large as W."""
    return report.proxy_loss > 0 and (report.proxy_loss >= 1 or (report.alignment or 0) > 1)


def replace_linears(parameters: Any, matrices: Mapping[str, Any]) -> Any:
    """A block's parameters with the weights of some linears replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    for linear, matrix in matrices.items():
        group, leaf = linear.split(".")
        result[group][leaf] = {**result[group][leaf], "weight": matrix}
    return result
