"""Rotations that a model's own weights take up: the same function, whose weights and Hessians have no outliers.

Of a residual stream x that only RMS norms read, `x R` is as good: gains of the norms go into the linears behind them,
what reads the stream becomes `W R`, what writes it `Rᵀ W`. The values of a head are rotated between the linear that
makes them and the one that takes their mixture. Nothing is left to do at run time. Source: QuaRot (2404.00456).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import InputError
from qjax.incoherence.families import Folded, Incoherence
from qjax.incoherence.rotations import Rotation, SignedHadamard, TwoStageOrthogonal
from qjax.linalg.hadamard import next_hadamard_order
from qjax.linalg.prng import name_id, root_key
from qjax.models.checkpoints.files import sha256_text
from qjax.models.config import ModelConfig
from qjax.models.families import family
from qjax.models.linear import linear_entry, replace_linears
from qjax.models.loading import Model

__all__ = ["FoldedBlocks", "folded", "prepared"]


def prepared(model: Model, incoherence: Incoherence, seed: int) -> Model:
    """The model that a recipe with this incoherence processing quantises: folded where it asks for that."""
    return folded(model, seed, heads=incoherence.heads) if isinstance(incoherence, Folded) else model


def folded(model: Model, seed: int, *, heads: bool = True) -> Model:
    """The same function with the residual stream and (`heads`) the values of every head rotated; the head is untied.

    Rotations are Hadamard matrices with random signs, or random orthogonal ones where there is none of that order.
    Blocks that lie on disk stay there and are folded when they are read.

    Raises InputError for a family whose residual stream cannot be rotated.
    """
    config = model.config
    if family(config).residual() is None:
        raise InputError(
            f"incoherence=folded rotates a residual stream that RMS norms alone read, before attention and MLP; "
            f"{config.architecture} is built otherwise: use incoherence=hadamard"
        )
    key = jax.random.fold_in(root_key(seed), name_id("folded"))
    stream = _rotation(jax.random.fold_in(key, 0), config.hidden_size)
    head = _rotation(jax.random.fold_in(key, 1), config.head_dim) if heads else None
    params = dict(model.params)
    params["embed"], params["head"], params["norm"] = _edges(
        params["embed"], params.get("head", params["embed"]), params["norm"], stream
    )
    own = dataclasses.replace(config, tie_embeddings=False)
    blocks = FoldedBlocks(model.params["blocks"], own, stream, head)
    params["blocks"] = list(blocks) if isinstance(model.params["blocks"], list | tuple) else blocks
    parts = (model.fingerprint["sha256"], "folded", str(seed), str(heads))
    fingerprint = {**model.fingerprint, "sha256": sha256_text(parts)}
    return dataclasses.replace(
        model, config=own, params=params, description=f"folded {model.description}", fingerprint=fingerprint
    )


class FoldedBlocks(Sequence[Any]):
    """Blocks that are folded when they are asked for; nothing is kept."""

    def __init__(self, blocks: Sequence[Any], config: ModelConfig, stream: Rotation, head: Rotation | None):
        self._blocks, self._config, self._rotations = blocks, config, (stream, head)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FoldedBlocks(self._blocks[index], self._config, *self._rotations)
        return _block(self._blocks[index], *self._rotations, config=self._config)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # unlike Sequence's, it does not hold a yielded block


def _rotation(key: Array, size: int) -> Rotation:
    whole = next_hadamard_order(size, 1) == size
    return SignedHadamard.sample(key, size) if whole else TwoStageOrthogonal.sample(key, size)


@jax.jit
def _edges(embed: Any, head: Any, norm: Any, stream: Any) -> tuple[Array, Array, Array]:
    return (
        _columns(embed, stream),
        _columns(_float(head) * _float(norm)[None, :], stream).astype(head.dtype),
        jnp.ones_like(norm),
    )


@functools.partial(jax.jit, static_argnames="config")
def _block(parameters: Any, stream: Any, head: Any, config: ModelConfig) -> Any:
    """A block's parameters with the rotations in its linears, and norms without gains."""
    around = family(config).residual()
    assert around is not None
    weights: dict[str, Array] = {}
    biases: dict[str, Array] = {}
    result = dict(parameters)
    for norm, linears in around.readers.items():
        gain = _float(parameters[norm])[None, :]
        weights |= {name: _columns(_weight(parameters, name) * gain, stream) for name in linears}
        result[norm] = jnp.ones_like(parameters[norm])
    for name in around.writers:
        weights[name] = _rows(_weight(parameters, name), stream)
        if (bias := _bias(parameters, name)) is not None:
            biases[name] = stream.apply(_float(bias))
    if head is not None:
        size, name = config.head_dim, around.values
        weights[name] = _rows(weights[name].reshape(-1, size, weights[name].shape[1]), head).reshape(
            weights[name].shape
        )
        if (bias := _bias(parameters, name)) is not None:
            biases[name] = head.apply(_float(bias).reshape(-1, size)).reshape(-1)
        mixed = weights[around.mixed]
        weights[around.mixed] = _columns(mixed.reshape(len(mixed), -1, size), head).reshape(mixed.shape)
    dtypes: Mapping[str, Any] = {name: linear_entry(parameters, name)["weight"].dtype for name in weights}
    result = replace_linears(result, {name: weight.astype(dtypes[name]) for name, weight in weights.items()})
    return replace_linears(
        result, {name: bias.astype(_bias(parameters, name).dtype) for name, bias in biases.items()}, key="bias"
    )


def _columns(weight: Array, rotation: Any) -> Array:
    """`W R`, in the dtype of W."""
    return rotation.apply(_float(weight)).astype(weight.dtype)


def _rows(weight: Array, rotation: Any) -> Array:
    """`Rᵀ W`, of the last two axes."""
    return jnp.swapaxes(rotation.apply(jnp.swapaxes(_float(weight), -1, -2)), -1, -2)


def _float(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _weight(parameters: Any, name: str) -> Array:
    return _float(linear_entry(parameters, name)["weight"])


def _bias(parameters: Any, name: str) -> Any:
    return linear_entry(parameters, name).get("bias")
