"""Embeddings and block outputs of all sequences, a batch at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from qjax.models.config import ModelConfig
from qjax.models.transformer import block, embed
from qjax.runtime.ahead import call
from qjax.runtime.mesh import EACH, WHOLE
from qjax.streams import activations
from qjax.streams.activations import Activations
from qjax.streams.batches import Spread
from qjax.typing import HostOrDevice

__all__ = ["batches", "embedded", "forward_block"]


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


def embedded(
    parameters: Any, tokens: Int[np.ndarray, "sequences length"], config: ModelConfig, batch: int
) -> Activations:
    """The first block's input of all sequences, where activations are placed; `parameters` are the model's "embed"."""
    shape = jax.eval_shape(functools.partial(embed, config=config), parameters, tokens[:1])
    x = activations.empty((*tokens.shape, shape.shape[-1]), shape.dtype)
    for number, (part, mask) in enumerate(batches(tokens, batch)):
        activations.put(x, number * batch, int(mask.sum()), embed(parameters, part, config))
    return x


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _blocks(parameters: Any, x: HostOrDevice, config: ModelConfig, *, mesh: Mesh) -> Array:
    """`block` on every device for its part of x."""
    own = functools.partial(block, config=config)
    return jax.shard_map(own, mesh=mesh, in_specs=(WHOLE, EACH), out_specs=EACH, check_vma=False)(parameters, x)


def forward_block(
    parameters: Any,
    x: Activations,
    config: ModelConfig,
    batch: int,
    out: Activations | None = None,
    spread: Spread | None = None,
) -> Activations:
    """The outputs of one block for all sequences (with `spread`: those that this process holds), where x is.

    They come in `out` when given, which may be x itself. Nothing is communicated.
    """
    out = activations.like(x) if out is None else out
    if spread is not None and spread.mesh.size > 1:
        parameters = spread.whole(parameters)
        for step in spread.feed(x):
            spread.put(out, step, _blocks(parameters, *step.parts, config, mesh=spread.mesh))
        return out
    for start, (part, mask) in zip(range(0, len(x), batch), batches(x, batch), strict=True):
        activations.put(out, start, int(mask.sum()), call(block, parameters, part, config))
    return out
