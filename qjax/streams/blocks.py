"""The loop over a model's blocks and all sequences: what measures, rounds, tunes or evaluates a model goes through it.

    for here in blocks(config, params, tokens, batch=8):
        hessians, here.y = block_hessians_and_outputs(here.parameters, here.x, …)

Block by block, the activations of all sequences are brought to the next block. The body may take the outputs from a
pass of its own (`here.y`), or put a changed block in the original's place (`here.finished`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.streams.activations import Activations
from qjax.streams.batches import Spread
from qjax.streams.forward import embedded, forward_block

__all__ = ["Block", "blocks"]


@dataclasses.dataclass
class Block:
    """A block, as the loop comes to it. The first four are given, the body may set the others.

    Attributes:
      index: its number.
      parameters: the original model's.
      x: its inputs in the original model, of all sequences that this process holds; None without that stream.
      z: its inputs in the quantised stream, behind the finished blocks before it; None without that stream.
      y: its outputs in the original model; what the body leaves out the loop computes.
      finished: the parameters that the quantised stream goes on with, by default the original's.
    """

    index: int
    parameters: Any
    x: Activations = None
    z: Activations = None
    y: Activations = None
    finished: Any = None


def blocks(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"] | None = None,
    *,
    batch: int = 8,
    spread: Spread | None = None,
    original: bool = True,
    quantized: bool = False,
    stop: int | None = None,
    outputs: bool = False,
    embedding: Any = None,
) -> Iterator[Block]:
    """All blocks in order, each with the activations that reach it.

    Args:
      params: `params["blocks"]` is iterated once, so it may read its blocks as it goes.
      tokens: of all sequences; None for a walk without activations.
      batch: sequences per step; the last step is filled up.
      spread: how sequences lie on a mesh, None on one device.
      original: whether there is the original model's stream, x.
      quantized: whether there is the quantised stream, z. Both begin with the same array, unless `embedding` is given.
      stop: the number of blocks to visit, None for all.
      outputs: whether those of the last block are wanted too, as its `y` when the loop has ended.
      embedding: what the quantised stream begins with in place of `params["embed"]`.

    Raises InputError for parameters with more or fewer blocks than the configuration says.
    """
    x = z = None
    if tokens is not None and (original or quantized):
        own = tokens if spread is None else spread.take(tokens)
        apart = quantized and embedding is not None
        if original or not apart:
            first = embedded(params["embed"], own, config, batch)
            x, z = (first if original else None), (first if quantized else None)
        if apart:
            z = embedded(embedding, own, config, batch)
    last, index = config.num_layers if stop is None else stop, -1
    for index, parameters in enumerate(params["blocks"]):
        if index == last:
            break
        here = Block(index, parameters, x, z)
        yield here
        if index + 1 == last and not outputs:
            return
        if z is not None:  # first: x may be the same array
            finished = here.parameters if here.finished is None else here.finished
            z = forward_block(finished, z, config, batch, None if z is x else z, spread)
        if x is not None:
            if here.y is None:
                here.y = forward_block(here.parameters, x, config, batch, x, spread)
            x = here.y
        del here, parameters  # a block that was read from disk is let go of before the next one is
    if stop is None and index + 1 != last:
        found = "more" if index == last else str(index + 1)
        raise InputError(f"the parameters hold {found} blocks, the configuration says {last}")
