"""The programs that quantising a model needs, begun before they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qjax.hessian.moments import accumulate, accumulate_pair, reduced, shapes
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.models.config import ModelConfig
from qjax.models.linear import linear_weight, replace_linears
from qjax.models.structure import abstract_block, structure
from qjax.models.transformer import block, embed
from qjax.pipeline.layer import layer_program
from qjax.pipeline.recipe import LayerPlan
from qjax.pipeline.records import Records
from qjax.runtime.ahead import ahead, compiling, possible
from qjax.runtime.mesh import single

__all__ = ["begin", "compiling"]


def begin(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    plans: Mapping[str, LayerPlan | None],
    *,
    seed: int,
    stream: str,
    outputs: bool = False,
    correction: float = 0.5,
    records: Records | None = None,
    batch: int = 8,
    mesh: Mesh | None = None,
) -> None:
    """Begin what `quantize_model` compiles with these arguments, in the order in which it will come to it.

    That is the Hessians of a block, the rounding of every shape, and the block with quantised matrices. Nothing is
    begun outside of `qjax.runtime.ahead.compiling`, for Hessians that are stored, on several devices, and where all
    matrices have their records.
    """
    if not possible() or stream == "original" or (mesh is not None and mesh.size > 1):
        return
    names = structure(config).sites
    todo = [
        {
            linear: plan
            for linear in names
            if (plan := plans[f"layers.{index}.{linear}"]) is not None
            and not (records is not None and records.has(f"layers.{index}.{linear}"))
        }
        for index in range(config.num_layers)
    ]
    if not any(todo):
        return
    first = next(index for index, own in enumerate(todo) if own)
    parameters, key = _stored(config, params), root_key(seed)
    batch = min(batch, len(tokens))
    x = jax.eval_shape(lambda parameters, part: embed(parameters, part, config), params["embed"], tokens[:batch])
    step = (jax.ShapeDtypeStruct((batch,), np.float32), jax.ShapeDtypeStruct((batch,), np.uint32))
    moments, one = shapes(config, pairs=stream == "corrected"), single()
    if stream == "corrected":
        ahead(accumulate_pair, moments, parameters, x, x, *step, config, mesh=one)
    else:
        ahead(accumulate, moments, parameters, x, *step, config, mesh=one, propagate=False)
    ahead(reduced, moments, mesh=one)

    rounding = {}
    for index, own in enumerate(todo):
        for linear, plan in own.items():
            weight = linear_weight(parameters, linear)
            square = jax.ShapeDtypeStruct((weight.shape[1],) * 2, np.float32)
            output = jax.ShapeDtypeStruct((weight.shape[0],) * 2, np.float32) if outputs else None
            hessian = Hessian(square, output, cross=square if stream == "corrected" else None)
            found = layer_program(weight, hessian, plan, linear, key, correction)
            ahead(found[0], *found[1], **found[2])
            if index == first:
                rounding[linear] = found
    try:
        made = {name: run.eval_shape(*arguments, **options) for name, (run, arguments, options) in rounding.items()}
    except Exception:  # what the rounding refuses it refuses again, and says which layer
        return
    ahead(block, replace_linears(parameters, {linear: out.matrix for linear, out in made.items()}), x, config)


def _stored(config: ModelConfig, params: Any) -> Any:
    """The parameters of a block as shapes, in the dtype in which the model was read."""
    dtype = jax.tree.leaves(params["embed"])[0].dtype
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_block(config))
