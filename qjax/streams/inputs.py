"""The inputs of a model's linears on a text, for those who want to look at them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qjax.data.stream import as_stream, check_vocabulary
from qjax.errors import InputError, suggested
from qjax.models.given import checked_batch, checked_model
from qjax.models.loading import Model
from qjax.models.structure import structure
from qjax.models.transformer import block_inputs, layer_names
from qjax.streams.blocks import blocks
from qjax.streams.forward import batches

__all__ = ["activations"]

_inputs = jax.jit(block_inputs, static_argnames="config")


def activations(
    model: Model, tokens: Any, layers: str | Sequence[str] | None = None, *, batch: int = 8
) -> dict[str, np.ndarray]:
    """The input x of linears `y = x Wᵀ`, by layer name, each `[sequences, length, in]` on the host.

    Linears that read the same input have the same array.

    Args:
      tokens: of `qjax.data.load` (its calibration side), or token ids [sequences, length].
      layers: names of layers, or a regular expression that is looked for in their names; None: all of them.
      batch: sequences per step.

    Raises InputError for a name that no layer has, with the nearest, and for a pattern that matches none.
    """
    checked_model(model)
    checked_batch(batch)
    stream = as_stream(tokens, "calibration")
    check_vocabulary(stream.tokens, model.config.vocab_size, "tokens")
    wanted = _chosen(layers, layer_names(model.config))
    sites, found = structure(model.config).sites, {}
    last = max(int(name.split(".")[1]) for name in wanted)
    for here in blocks(model.config, model.params, stream.tokens, batch=batch, stop=last + 1):
        own = {linear for linear in sites if f"layers.{here.index}.{linear}" in wanted}
        if not own or here.x is None:
            continue
        needed = {sites[linear] for linear in own}
        parts: dict[str, list[np.ndarray]] = {site: [] for site in needed}
        outputs = []
        for part, mask in batches(here.x, batch):
            y, inputs = _inputs(here.parameters, part, model.config)
            count = int(mask.sum())
            outputs.append(np.asarray(y)[:count])
            for site in needed:
                parts[site].append(np.asarray(inputs[site])[:count])
        here.y = np.concatenate(outputs)
        arrays = {site: np.concatenate(pieces) for site, pieces in parts.items()}
        found |= {f"layers.{here.index}.{linear}": arrays[sites[linear]] for linear in sites if linear in own}
    return found


def _chosen(layers: str | Sequence[str] | None, names: Sequence[str]) -> set[str]:
    """The names that are meant."""
    if layers is None:
        return set(names)
    if isinstance(layers, str):
        try:
            chosen = {name for name in names if name == layers or re.search(layers, name)}
        except re.error as error:
            raise InputError(f"layers is {layers!r}, no regular expression ({error}); fix the pattern") from error
        if not chosen:
            raise InputError(
                f"layers is {layers!r}, which no layer's name matches{suggested(layers, names)}; names look like "
                f"{names[0]} … {names[-1]}"
            )
        return chosen
    if not isinstance(layers, Sequence):
        raise InputError(f"layers is {layers!r} ({type(layers).__name__}); give names, a pattern, or None for all")
    for name in layers:
        if name not in names:
            raise InputError(
                f"layers: there is no {name!r}{suggested(name, names)}; names look like {names[0]} … {names[-1]}"
            )
    if not layers:
        raise InputError("layers is empty; give names, a pattern, or None for all")
    return set(layers)
