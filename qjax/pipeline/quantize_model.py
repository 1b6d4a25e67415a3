"""A whole model, block by block: Hessians, rounding, propagation, with a record of every finished layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from qjax.errors import InputError, RunError
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.moments import block_hessians, block_hessians_of_two_streams
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.matrix.operator import LinearOperator
from qjax.matrix.quantize import MatrixReport, splits_rows
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models.config import ModelConfig
from qjax.models.edges import with_edges
from qjax.models.linear import linear_weight, replace_linears
from qjax.models.structure import structure
from qjax.models.transformer import layer_names
from qjax.pipeline.edges import quantize_edges
from qjax.pipeline.finished import FinishedBlocks
from qjax.pipeline.hessians import STREAMS
from qjax.pipeline.layer import quantize_layer
from qjax.pipeline.programs import begin, compiling
from qjax.pipeline.recipe import LayerPlan, Recipe
from qjax.pipeline.records import Records
from qjax.runtime.distributed import is_primary, on_all, on_primary
from qjax.runtime.mesh import single
from qjax.runtime.shares import compute
from qjax.streams.batches import Spread
from qjax.streams.blocks import blocks

__all__ = ["QuantizedModel", "quantize_model"]


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedModel:
    """Parameters with operators in place of linears' weights, and the report of every quantised layer in order."""

    params: Any
    reports: list[MatrixReport]

    def __repr__(self) -> str:
        return f"QuantizedModel({len(self.reports)} matrices)"


@compiling()
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
    mesh: Mesh | None = None,
    held_bytes: int | None = None,
    experts: ExpertFactor = ExpertFactor(),  # noqa: B008  (frozen)
) -> QuantizedModel:
    """Quantise every linear of a model by `recipe`, and before them the embedding and head where its rules name them.

    Args:
      tokens: calibration tokens `[sequences, length]`.
      seed: the run's root seed; every layer's key is derived from it and the layer's name.
      stream: "quantized": block i sees what the quantised blocks before it produce (GPTQ, QuIP); "corrected": the same,
        and its targets make up for what went wrong before it, by the share `correction` (see
        `qjax.rounding.correction`);
        "original": all Hessians come from the unquantised model (QuIP#, QTIP), given by `hessians(block index)`.
      outputs: where the output factors come from when the input factors are made here, block by block.
      records: where finished layers are kept and found again.
      on_layer: called with each layer's report and whether it was found finished.
      mesh: the devices, of one or several processes; None is one device. Sequences and rows are split over them, and
        matrices whose rows are not independent shared out. All processes call this with the same arguments and a
        folder for `records` that all see: process 0 writes it, and every process what it alone computed. Given the same
        Hessians the codes are those of one device; Hessians of another mesh differ in their last bits.
      held_bytes: how much of the finished matrices stays in memory, None for all. The blocks beyond it are read from
        `records` again, one at a time, when those of the result are iterated over (`FinishedBlocks`).
      experts: how the input factors of a mixture's experts are made.

    Raises InputError for a recipe that does not fit the model, NumericsError as `quantize_matrix`.
    """
    if stream not in STREAMS or (stream == "original") != (hessians is not None):
        raise InputError(
            f"hessian.stream is {stream!r}; allowed are quantized, corrected, and original with stored Hessians"
        )
    plans = recipe.plan(layer_names(config))
    key = root_key(seed)
    announced = {"seed": seed, "stream": stream, "correction": correction, "batch": batch, "mesh": mesh}
    begin(config, params, tokens, plans, outputs=outputs is not None, records=records, **announced)
    spread = Spread(len(tokens), batch, mesh or single())
    edges, reports = quantize_edges(
        config, params, tokens, recipe, seed=seed, records=records, batch=batch, spread=spread, on_layer=on_layer
    )
    outside = with_edges(params, edges, config)
    result = [] if records is None or held_bytes is None else FinishedBlocks(records, held_bytes)
    walk = blocks(
        config,
        params,
        tokens,
        batch=batch,
        spread=spread,
        original=stream == "corrected",
        quantized=stream != "original",
        embedding=outside["embed"] if "embed" in edges else None,
    )
    for here in walk:
        index, parameters = here.index, here.parameters
        planned = {
            name: plan for name in structure(config).sites if (plan := plans[f"layers.{index}.{name}"]) is not None
        }
        done = {} if records is None else _found(index, planned, records)
        todo = {linear: plan for linear, plan in planned.items() if linear not in done}
        block = {}
        if hessians is not None:
            block = hessians(index) if todo else {}
        elif here.x is not None:
            # Also for a finished block: x must come from the same program, for a resumed run to give the same bytes.
            block, here.y = block_hessians_of_two_streams(
                parameters, here.x, here.z, config, index=index, batch=batch, spread=spread
            )
        elif todo:
            block = block_hessians(parameters, here.z, config, index=index, batch=batch, spread=spread)
        if outputs is not None and todo:
            factors = outputs(index)
            block = {linear: dataclasses.replace(h, output=factors[linear].output) for linear, h in block.items()}
        round_one = functools.partial(_quantized, config, experts, key, correction, index)
        alone = _alone(parameters, index, block, todo, round_one, records, spread.mesh)
        for linear in planned:
            if linear in alone:
                done[linear] = alone[linear]
            elif linear in todo:
                weight = linear_weight(parameters, linear)
                matrix, report = round_one(linear, weight, block[linear], todo[linear], spread.mesh)
                if records is not None and is_primary():
                    records.save(matrix, report)
                done[linear] = matrix, report
            reports.append(done[linear][1])
            if on_layer is not None:
                on_layer(done[linear][1], linear not in todo)
        here.finished = replace_linears(parameters, {linear: matrix for linear, (matrix, _) in done.items()})
        result.append(here.finished)
    return QuantizedModel({**outside, "blocks": result}, reports)


def _quantized(
    config: ModelConfig,
    experts: ExpertFactor,
    key: jax.Array,
    correction: float,
    index: int,
    linear: str,
    weight: Any,
    hessian: Hessian,
    plan: LayerPlan,
    mesh: Mesh | None = None,
) -> tuple[QuantizedMatrix, MatrixReport]:
    """One linear of block `index` by its plan."""
    expert, name = structure(config).experts.get(linear), f"layers.{index}.{linear}"
    return quantize_layer(weight, hessian, plan, name, key, correction, mesh, expert, experts)


_Done: TypeAlias = dict[str, tuple[LinearOperator, MatrixReport]]


def _found(index: int, planned: Mapping[str, LayerPlan], records: Records) -> _Done:
    """The finished matrices of a block. Process 0 says which, so that all go on with the same."""
    found = {linear: records.load(f"layers.{index}.{linear}") for linear in planned}
    there = on_primary(lambda: [linear for linear, record in found.items() if record is not None])
    return {linear: found[linear] or _of_another(records, f"layers.{index}.{linear}") for linear in there}


def _alone(
    parameters: Any,
    index: int,
    hessians: Mapping[str, Hessian],
    todo: Mapping[str, LayerPlan],
    round_one: Callable[..., tuple[QuantizedMatrix, MatrixReport]],
    records: Records | None,
    mesh: Mesh,
) -> _Done:
    """Those matrices to do whose rows cannot be split, on a mesh of several devices: each on one device.

    What other processes computed is read from their records; without records every process computes all of them.
    """
    own = {linear: plan for linear, plan in todo.items() if not splits_rows(plan.rounding, plan.codebook, plan.scale)}
    if mesh.size == 1 or not own:
        return {}

    def task(linear: str, plan: LayerPlan, device: jax.Device) -> tuple[LinearOperator, MatrixReport]:
        weight, hessian = jax.device_put((linear_weight(parameters, linear), hessians[linear]), device)
        matrix, report = round_one(linear, weight, hessian, plan)
        matrix = jax.device_put(jax.device_get(dataclasses.replace(matrix, codebook=None)))
        matrix = dataclasses.replace(matrix, codebook=plan.codebook)
        if records is not None:
            records.save(matrix, report)
        return matrix, report

    def cost(linear: str) -> float:
        rows, columns = np.shape(linear_weight(parameters, linear))
        return float(rows) * columns * (rows + columns)

    done = on_all(
        lambda: compute(
            {linear: functools.partial(task, linear, plan) for linear, plan in own.items()},
            {linear: cost(linear) for linear in own},
            mesh,
            all_here=records is None,
        )
    )
    for linear in own:
        if linear not in done and records is not None:
            done[linear] = _of_another(records, f"layers.{index}.{linear}")
    return done


def _of_another(records: Records, name: str) -> tuple[LinearOperator, MatrixReport]:
    found = records.load(name)
    if found is None:
        raise RunError(
            f"{name}: another process has its record, in {records.folder}, and here it cannot be read; all processes "
            "need the same file system"
        )
    return found
