"""Hessians of all linears of a model from calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from qjax.errors import DataError, InputError
from qjax.hessian.estimators import ESTIMATORS
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.moments import block_hessians_and_outputs
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.runtime.mesh import single
from qjax.streams.batches import Spread
from qjax.streams.blocks import blocks

__all__ = ["collect"]


def collect(
    model: Any,
    tokens: Int[np.ndarray, "sequences length"],
    estimator: str = "input",
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    mesh: Mesh | None = None,
    **sketch: Any,
) -> dict[str, Hessian]:
    """Hessians of every linear of `model` (config, params) from calibration tokens, all from the original model.

    "input": `H_in = E[x xᵀ]`, uncentred, float32 (GPTQ, QuIP). Layers that share an input share the array.
    "sketch_a", "sketch_b": both factors of a Kronecker sketch of the Fisher matrix (see `qjax.hessian.sketch`);
    `rounds`, `labels` and `seed` are those of `Sketch`.

    `mesh`: sequences are split over all its devices, `batch` of them on each at a time, and every factor is reduced
    once; None is one device. All processes of the mesh call this with the same tokens.

    An expert's has the tokens that are routed to it, shrunk towards that of all tokens as `ExpertFactor` does by
    default.

    Raises InputError for an unknown estimator, DataError for no tokens, NumericsError for inputs that are not finite.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown Hessian estimator {estimator!r}; there is: {', '.join(ESTIMATORS)}")
    if not hasattr(model, "config") or not hasattr(model, "params"):
        raise InputError(f"model is {model!r} ({type(model).__name__}); give a model of qjax.load")
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0:
        raise DataError(
            f"calibration tokens have shape {tokens.shape}; [sequences, length] with at least one token is needed"
        )
    config: ModelConfig = model.config
    batch = min(batch, len(tokens))
    if estimator != "input":
        from qjax.hessian.sketch_collect import collect_sketch  # it stands above this module

        return collect_sketch(
            config, model.params, tokens, estimator, batch=batch, progress=progress, mesh=mesh, **sketch
        )
    if sketch:
        raise InputError(f"{', '.join(sketch)}: options of the estimators sketch_a and sketch_b, not of 'input'")
    spread = Spread(len(tokens), batch, mesh or single())
    hessians: dict[str, Hessian] = {}
    factor = ExpertFactor()
    for here in blocks(config, model.params, tokens, batch=batch, spread=spread):
        found, here.y = block_hessians_and_outputs(
            here.parameters, here.x, config, index=here.index, batch=batch, spread=spread
        )
        names = {name: f"layers.{here.index}.{name}" for name in found}
        hessians |= {names[name]: factor(hessian, names[name]) for name, hessian in found.items()}
        if progress is not None:
            progress(here.index + 1, config.num_layers)
    return hessians
