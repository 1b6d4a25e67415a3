"""A decoder-only transformer as pure functions on parameter pytrees, whatever its family.

Parameters: `{"embed", "norm", "head" (absent when tied), "blocks": [block, …]}`, see `qjax.models.families.base`. All
linear weights are `[out, in]`, e.g. of a Llama:

    {"embed": [vocab, width], "norm": [width], "head": [vocab, width],
     "blocks": [{"input_layernorm": [width], "post_attention_layernorm": [width],
                 "self_attn": {"q_proj": {"weight", "bias"?}, "k_proj", "v_proj", "o_proj", "q_norm"?, "k_norm"?},
                 "mlp": {"gate_proj": {...}, "up_proj": {...}, "down_proj": {...}}}, ...]}

A block is one compiled program for all layers: weights are arguments, never constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.linalg.compiled import lean_jit
from qjax.models.attention import capped
from qjax.models.config import ModelConfig
from qjax.models.context import Context
from qjax.models.families import KIND, family
from qjax.models.linear import linear, linear_weight, recorded, replace_linears
from qjax.models.on_mesh import HIDDEN, placed, spread
from qjax.models.structure import structure
from qjax.typing import HostOrDevice

__all__ = ["block", "block_inputs", "embed", "final", "forward", "head", "layer_names", "logits", "probed"]

Params = Any  # a pytree as in the module's docstring
Hidden = Float[Array, "batch length width"]
HiddenInput = Float[HostOrDevice, "batch length width"]  # as callers of the compiled programs may have it


def layer_names(config: ModelConfig) -> list[str]:
    """The names of all linears, in the order of the forward pass: `layers.<i>.<linear>`."""
    return [f"layers.{i}.{name}" for i in range(config.num_layers) for name in structure(config).sites]


def _output(parameters: Params, config: ModelConfig, x: HiddenInput) -> Hidden:
    return family(config).block(parameters, x, Context(config, parameters.get(KIND)))


@lean_jit(static_argnames="config")
def block(parameters: Params, x: HiddenInput, config: ModelConfig) -> Hidden:
    """One transformer block; over a mesh where its parameters lie on one."""
    return spread(_output, parameters, config, (x,), (HIDDEN,), HIDDEN)


def block_inputs(parameters: Params, x: HiddenInput, config: ModelConfig) -> tuple[Hidden, dict[str, Array]]:
    """The block's output and the input `[batch, length, in]` of its linears at every site.

    That of an expert has zeros for tokens that are not routed to it.
    """
    y, seen = block_record(parameters, x, config)
    return y, {site: own for site, (own, _, _) in seen.items()}


def block_record(
    parameters: Params, x: HiddenInput, config: ModelConfig
) -> tuple[Hidden, dict[str, tuple[Array, Array | None, Array | None]]]:
    """The block's output and, at every site, (input, which tokens count `[batch, length]`, the input of all tokens).

    The last two are an expert's, None for other linears; see `qjax.models.linear.Record`.
    """
    sites = {id(linear_weight(parameters, name)): site for name, site in structure(config).sites.items()}
    with recorded() as record:
        y = _output(parameters, config, x)
    parts = zip(record.weights, record.inputs, record.routed, record.every, strict=True)
    return y, {sites[id(weight)]: (own, routed, every) for weight, own, routed, every in parts}


def probed(
    parameters: Params, x: HiddenInput, config: ModelConfig
) -> tuple[Hidden, Callable[[HiddenInput], tuple[Hidden, dict[str, Array]]], dict[str, Array]]:
    """One block whose linears' outputs can be differentiated by: (its output, pull, the linears' inputs by site).

    `pull(∂ℓ/∂output)` gives `∂ℓ/∂x` and the gradients `g = ∂ℓ/∂y` of the linears' outputs y by linear, all
    `[batch, length, ...]`: those of zeros that are added to them. No gradients of weights are computed.
    """
    batch, length, _ = x.shape

    def run(x: Array, probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        return block_inputs(replace_linears(parameters, probes, key="probe"), x, config)

    zeros = {name: jnp.zeros((batch, length, out), x.dtype) for name, (out, _) in structure(config).shapes.items()}
    return jax.vjp(run, jnp.asarray(x), zeros, has_aux=True)


@functools.partial(jax.jit, static_argnames="config")
def embed(
    parameters: Params,
    tokens: Int[HostOrDevice, "batch length"],
    config: ModelConfig,
    start: Int[HostOrDevice, " batch"] | None = None,
) -> Hidden:
    """The first block's input; `parameters` are the model's "embed", `start` the position of every first token (0).

    Tokens must lie inside the vocabulary (checked where token streams are made).
    """
    tokens = jnp.asarray(tokens)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = positions if start is None else positions + jnp.asarray(start)[:, None]
    return family(config).embed(parameters, tokens, positions, config)


def head(params: Params) -> dict[str, Any]:
    """The parameters of the last step: `{"norm", "head": [vocab, features]}`."""
    table = params["embed"]
    tied = table["tokens"] if isinstance(table, Mapping) else table
    return {"norm": params["norm"], "head": params.get("head", tied)}


def final(parameters: Params, x: HiddenInput, config: ModelConfig) -> Float[Array, "batch length features"]:
    """The factor of the vocabulary's matrix in the logits; `parameters` as returned by `head`."""
    return family(config).final(parameters["norm"], x, config)


@functools.partial(jax.jit, static_argnames="config")
def logits(parameters: dict[str, Any], x: HiddenInput, config: ModelConfig) -> Float[Array, "batch length vocab"]:
    """Final norm and output projection, in float32; `parameters` as returned by `head`."""
    values = linear(final(parameters, x, config), parameters["head"]).astype(jnp.float32)
    return capped(values, config.logits_cap)


def forward(params: Params, tokens: Int[HostOrDevice, "batch length"], config: ModelConfig) -> Array:
    """Logits `[batch, length, vocab]` of every position; a linear's weight is an array or an operator."""
    x = embed(params["embed"], tokens, config)
    for parameters in params["blocks"]:
        x = placed(x, parameters)
        x = block(parameters, x, config)
    return logits(head(params), x, config)
