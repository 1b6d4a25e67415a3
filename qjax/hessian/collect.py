"""Hessians of all linears of a model from calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from qjax import activations
from qjax.activations import Activations
from qjax.errors import DataError, InputError, NumericsError
from qjax.hessian.accumulate import CROSS, Moments, accumulate, accumulate_pair, empty, finish
from qjax.hessian.spread import Spread
from qjax.hessian.statistics import Hessian
from qjax.mesh import single
from qjax.models.config import ModelConfig
from qjax.models.linear import HostOrDevice
from qjax.models.transformer import LINEARS, embed

__all__ = [
    "ESTIMATORS",
    "batches",
    "block_hessians",
    "block_hessians_and_outputs",
    "block_hessians_of_two_streams",
    "collect",
    "embedded",
    "layer_names",
]

ESTIMATORS = ("input", "sketch_a", "sketch_b")


def layer_names(config: ModelConfig) -> list[str]:
    """The names of all linears, in the order of the forward pass: `layers.<i>.<self_attn|mlp>.<name>_proj`."""
    return [f"layers.{i}.{linear}" for i in range(config.num_layers) for linear in LINEARS]


def batches(sequences: Activations, batch: int) -> Iterator[tuple[HostOrDevice, np.ndarray]]:
    """Equal batches along the first axis and their masks; the last one is padded by repetition with mask 0."""
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        mask = np.ones(batch, np.float32)
        mask[len(part) :] = 0
        if len(part) < batch:
            part = np.asarray(part)
            part = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
        yield part, mask


def embedded(table: Any, tokens: Int[np.ndarray, "sequences length"], batch: int) -> Activations:
    """The embedding vectors of all sequences, where activations are placed: the input of the first block."""
    x = activations.empty((*tokens.shape, table.shape[1]), table.dtype)
    for number, (part, mask) in enumerate(batches(tokens, batch)):
        activations.put(x, number * batch, int(mask.sum()), embed(table, part))
    return x


def block_hessians(
    parameters: Any, x: Activations, config: ModelConfig, *, index: int, batch: int, spread: Spread | None = None
) -> dict[str, Hessian]:
    """`H = E[x xᵀ]` of every linear of block `index`; linears that share an input share the array.

    `x` are the block's inputs `[sequences, length, width]`, wherever they lie: all of them, or with `spread` those that
    this process holds. Raises NumericsError, in all processes alike, naming the first linear whose input is not finite.
    """
    spread = spread or Spread(len(x), batch)
    moments, parameters = empty(config, spread), spread.whole(parameters)
    for step in spread.feed(x):
        moments, _ = accumulate(
            moments, parameters, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh, propagate=False
        )
    return _hessians(moments, index, spread, x.shape[1])


def block_hessians_and_outputs(
    parameters: Any, x: Activations, config: ModelConfig, *, index: int, batch: int, spread: Spread | None = None
) -> tuple[dict[str, Hessian], Activations]:
    """The result of `block_hessians`, and the block's outputs `[sequences, length, width]` from the same pass."""
    spread = spread or Spread(len(x), batch)
    moments, parameters, outputs = empty(config, spread), spread.whole(parameters), activations.like(x)
    for step in spread.feed(x):
        moments, y = accumulate(
            moments, parameters, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh, propagate=True
        )
        assert y is not None
        spread.put(outputs, step, y)
    return _hessians(moments, index, spread, x.shape[1]), outputs


def block_hessians_of_two_streams(
    parameters: Any,
    x: Activations,
    z: Activations,
    config: ModelConfig,
    *,
    index: int,
    batch: int,
    spread: Spread | None = None,
) -> tuple[dict[str, Hessian], Activations]:
    """`H = E[z zᵀ]` and `C = E[x zᵀ]` of every linear, and the original block's outputs for x.

    x are the block's inputs in the original model, z those in the quantised stream.
    """
    spread = spread or Spread(len(x), batch)
    moments, outputs = empty(config, spread, cross=True), activations.like(x)
    parameters = spread.whole(parameters)
    for step in spread.feed(x, z):
        moments, y = accumulate_pair(
            moments, parameters, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh
        )
        spread.put(outputs, step, y)
    return _hessians(moments, index, spread, x.shape[1]), outputs


def _hessians(moments: Moments, index: int, spread: Spread, length: int) -> dict[str, Hessian]:
    tokens = spread.sequences * length
    means, bad = finish(moments, tokens, spread.mesh)
    means = jax.device_put(means)  # once: the program of every linear would copy a host array for itself
    if bad:
        site, sequence = next(iter(bad.items()))
        name = next(linear for linear, own in LINEARS.items() if own == site)
        raise NumericsError(
            f"layers.{index}.{name}: its inputs on the calibration data are not finite, first in sequence {sequence}; "
            "drop that sequence, check the weights of the blocks before it, or load the model in float32"
        )
    return {linear: Hessian(means[site], None, tokens, means.get(CROSS[site])) for linear, site in LINEARS.items()}


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

    Raises InputError for an unknown estimator, DataError for no tokens, NumericsError for inputs that are not finite.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown Hessian estimator {estimator!r}; there is: {', '.join(ESTIMATORS)}")
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
    x = embedded(model.params["embed"], spread.take(tokens), batch)
    hessians: dict[str, Hessian] = {}
    for index, parameters in enumerate(model.params["blocks"]):
        block, x = block_hessians_and_outputs(parameters, x, config, index=index, batch=batch, spread=spread)
        hessians |= {f"layers.{index}.{linear}": hessian for linear, hessian in block.items()}
        if progress is not None:
            progress(index + 1, config.num_layers)
    return hessians
