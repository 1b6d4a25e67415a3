"""A whole model, block by block, each tuned while it is quantised, with a record of every finished block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from qjax.finetune.block import BlockReport, BlockTuning, tune_block
from qjax.hessian.experts import ExpertFactor
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.matrix.operator import LinearOperator, is_operator
from qjax.matrix.quantize import MatrixReport
from qjax.models.config import ModelConfig
from qjax.models.linear import linear_weight, replace_linears
from qjax.models.structure import structure
from qjax.models.transformer import layer_names
from qjax.pipeline.finished import FinishedBlocks
from qjax.pipeline.layer import quantize_layer
from qjax.pipeline.quantize_model import QuantizedModel
from qjax.pipeline.recipe import LayerPlan, Recipe
from qjax.pipeline.records import Records
from qjax.streams.blocks import blocks
from qjax.streams.forward import forward_block

__all__ = ["quantize_and_tune"]

_Block: TypeAlias = tuple[Any, list[MatrixReport], list[BlockReport]]
"""A finished block: its parameters, and the reports of its matrices and of its tuning after each group of them."""


def quantize_and_tune(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    recipe: Recipe,
    settings: BlockTuning,
    *,
    seed: int,
    hessians: Callable[[int], Mapping[str, Hessian]],
    records: Records | None = None,
    batch: int = 8,
    on_layer: Callable[[MatrixReport, bool], None] = lambda report, found: None,
    on_block: Callable[[int, BlockReport], None] = lambda index, report: None,
    held_bytes: int | None = None,
    experts: ExpertFactor = ExpertFactor(),  # noqa: B008  (frozen)
) -> QuantizedModel:
    """As `pipeline.quantize_model` with the stream "original", and every block tuned after each group of its matrices.

    Every block aims at the original model's outputs and reads its activations, or with `settings.stream` "quantized"
    those of the tuned blocks before it; Hessians are the original model's. A killed run repeats the block that it was
    in. Raises InputError for a recipe or rules that do not fit, NumericsError as `quantize_matrix`.
    """
    plans = recipe.plan(layer_names(config))
    key = root_key(seed)
    reports = []
    result = [] if records is None or held_bytes is None else FinishedBlocks(records, held_bytes)
    for here in blocks(config, params, tokens, batch=batch, quantized=settings.stream == "quantized"):
        index, parameters = here.index, here.parameters
        own = here.x if here.z is None else here.z  # what the block reads
        here.y = forward_block(parameters, here.x, config, batch)
        found = None if records is None else _found_block(parameters, index, config, plans, records)
        fresh = found is None
        if found is None:
            hessian = hessians(index)

            def quantize(weights: Any, linear: str, index: int = index, hessian: Any = hessian) -> Any:
                name = f"layers.{index}.{linear}"
                plan = plans[name]
                if plan is None:
                    return None
                expert, weight = structure(config).experts.get(linear), linear_weight(weights, linear)
                return quantize_layer(weight, hessian[linear], plan, name, key, 0.0, expert=expert, experts=experts)

            found = _one_block(parameters, own, here.y, config, settings, seed, quantize)
            if records is not None:
                _record_block(*found, index, records)
        here.finished = found[0]
        result.append(found[0])
        for tuned in found[2]:
            on_block(index, tuned)
        for report in found[1]:
            reports.append(report)
            on_layer(report, not fresh)
    return QuantizedModel({**params, "blocks": result}, reports)


def _one_block(
    parameters: Any,
    x: np.ndarray,
    y: np.ndarray,
    config: ModelConfig,
    tuning: BlockTuning,
    seed: int,
    quantize: Callable[[Any, str], tuple[LinearOperator, MatrixReport] | None],
) -> _Block:
    """Quantise the groups of a block in order and tune what is left of it after each."""
    reports: dict[str, MatrixReport] = {}
    tuned: list[BlockReport] = []
    for group in structure(config).groups:  # the block is tuned after each
        made = {linear: result for linear in group if (result := quantize(parameters, linear)) is not None}
        if not made:
            continue
        reports |= {linear: report for linear, (_, report) in made.items()}
        parameters = replace_linears(parameters, {linear: matrix for linear, (matrix, _) in made.items()})
        parameters, report = tune_block(parameters, x, y, config, tuning, seed=seed)
        tuned.append(report)
    return parameters, list(reports.values()), tuned


def _record_block(
    parameters: Any,
    reports: list[MatrixReport],
    tuned: list[BlockReport],
    index: int,
    records: Records,
) -> None:
    """The matrices with their gains, and then all else of the block, which marks it finished."""
    for report in reports:
        records.save(linear_weight(parameters, report.name.split(".", 2)[2]), report)
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=is_operator)
    dense = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if not is_operator(leaf)}
    arrays = {name: np.asarray(leaf) for name, leaf in dense.items()}
    records.save_dense(index, arrays, [dataclasses.asdict(report) for report in tuned])


def _found_block(
    parameters: Any, index: int, config: ModelConfig, plans: Mapping[str, LayerPlan | None], records: Records
) -> _Block | None:
    """A finished block from its records, or None when some of it is missing."""
    stored_dense = records.load_dense(index)
    every = {linear: f"layers.{index}.{linear}" for linear in structure(config).sites}
    names = {linear: name for linear, name in every.items() if plans[name] is not None}
    found = {linear: records.load(name) for linear, name in names.items()}
    whole = {linear: record for linear, record in found.items() if record is not None}
    if stored_dense is None or len(whole) < len(found):
        return None
    dense, tuned = stored_dense
    parameters = replace_linears(parameters, {linear: matrix for linear, (matrix, _) in whole.items()})

    def stored(path: Any, leaf: Any) -> Any:
        return leaf if is_operator(leaf) else jax.device_put(dense[jax.tree_util.keystr(path)])

    parameters = jax.tree_util.tree_map_with_path(stored, parameters, is_leaf=is_operator)
    return parameters, [report for _, report in whole.values()], [BlockReport(**report) for report in tuned]
