"""Embedding and head: one stage before the blocks, by the function that quantises every matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.hessian.head import head_hessian
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.matrix.lookup import Lookup
from qjax.matrix.operator import LinearOperator
from qjax.matrix.quantize import MatrixReport
from qjax.models.config import ModelConfig
from qjax.models.edges import Edge, edge_matrices, edge_weight
from qjax.pipeline.layer import quantize_layer
from qjax.pipeline.recipe import LayerPlan, Recipe
from qjax.pipeline.records import Records
from qjax.runtime.distributed import is_primary, on_primary
from qjax.runtime.group import visible
from qjax.streams.batches import Spread

__all__ = ["quantize_edges"]


def quantize_edges(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    recipe: Recipe,
    *,
    seed: int,
    records: Records | None = None,
    batch: int = 8,
    spread: Spread | None = None,
    on_layer: Callable[[MatrixReport, bool], None] | None = None,
) -> tuple[dict[str, LinearOperator], list[MatrixReport]]:
    """(operators by name, reports) of those of embedding and head that rules of the recipe name.

    The Hessian of the head, and of a matrix that is both, is the second moment of the head's inputs in the original
    model, whatever the stream of the blocks: one forward pass. That of an embedding alone is the identity: rows are
    looked up, and an error counts alike in all columns.

    Raises InputError as `Recipe.edges`, NumericsError as `quantize_matrix` and `head_hessian`.
    """
    matrices: dict[str, LinearOperator] = {}
    reports: list[MatrixReport] = []
    moment: Hessian | None = None
    known = edge_matrices(config)
    for name, plan in recipe.edges(known).items():
        edge = known[name]
        there = None if records is None else on_primary(lambda name=name: records.load(name) is not None)
        done = records.load(name) if records is not None and there else None
        if done is None:
            if moment is None and (edge.tied or name == "head"):
                moment = head_hessian(config, params, tokens, batch=batch, spread=spread)
            hessian = moment if edge.tied or name == "head" else _identity(edge)
            done = _quantized(edge, edge_weight(params, edge), hessian, plan, seed)
            if records is not None and is_primary():
                records.save(*done)
            if records is not None:
                visible(records.folder / f"{name}.safetensors")
        matrices[name] = done[0]
        reports.append(done[1])
        if on_layer is not None:
            on_layer(done[1], bool(there))
    return matrices, reports


def _quantized(
    edge: Edge, weight: Any, hessian: Hessian | None, plan: LayerPlan, seed: int
) -> tuple[LinearOperator, MatrixReport]:
    assert hessian is not None
    matrix, report = quantize_layer(weight, hessian, plan, edge.name, root_key(seed), 0.0)
    if edge.name == "embed" and weight.dtype != jnp.float32:
        return Lookup(matrix, str(weight.dtype)), report
    return matrix, report


def _identity(edge: Edge) -> Hessian:
    return Hessian(jax.device_put(np.eye(edge.shape[1], dtype=np.float32)))
