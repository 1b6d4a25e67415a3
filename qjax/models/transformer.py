"""A decoder-only transformer of the Llama family as pure functions on parameter pytrees.

Parameters, all linear weights `[out, in]`:

    {"embed": [vocab, width], "norm": [width], "head": [vocab, width] (absent when tied),
     "blocks": [{"input_layernorm": [width], "post_attention_layernorm": [width],
                 "self_attn": {"q_proj": {"weight", "bias"?}, "k_proj", "v_proj", "o_proj", "q_norm"?, "k_norm"?},
                 "mlp": {"gate_proj": {...}, "up_proj": {...}, "down_proj": {...}}}, ...]}

A block is one compiled program for all layers: weights are arguments, never constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.attention import attend
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.linear import linear
from qjax.models.on_mesh import HIDDEN, placed, spread
from qjax.typing import HostOrDevice

__all__ = [
    "LINEARS",
    "SITES",
    "apply",
    "block",
    "block_inputs",
    "embed",
    "forward",
    "head",
    "layer_names",
    "logits",
    "probed",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "rotate",
]

Params = Any  # a pytree as in the module's docstring
Hidden = Float[Array, "batch length width"]
HiddenInput = Float[HostOrDevice, "batch length width"]  # as callers of the compiled programs may have it

# Every linear of a block, in the order of the forward pass, with the site (shared input) that feeds it.
LINEARS: dict[str, str] = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention_output",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp_output",
}
SITES: tuple[str, ...] = tuple(dict.fromkeys(LINEARS.values()))


def apply(parameters: Params, x: Array) -> Array:
    """A linear with its bias, if any."""
    y = linear(x, parameters["weight"])
    if "bias" in parameters:
        y = y + parameters["bias"].astype(y.dtype)[None, None, :]
    return y + parameters["probe"] if "probe" in parameters else y  # see `probed`


def rms_norm(x: HostOrDevice, gain: HostOrDevice, eps: float) -> Array:
    """`gain · x / √(mean x² + eps)` along the last axis, in float32; the dtype of x."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    gain = jnp.expand_dims(gain.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (jax.lax.rsqrt(mean_square + eps) * x32 * gain).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position `[head_dim/2]`, float64: `theta^(-2i/head_dim)`, slow ones stretched by Llama 3's rule."""
    half = head_dim // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return frequency
    wavelength = 2 * np.pi / frequency
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * frequency / scaling.factor + blend * frequency
    slow = np.where(wavelength > low, frequency / scaling.factor, smooth)
    return np.where(wavelength < high, frequency, slow)


def rope_tables(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin `[length, head_dim/2]` of the rotary angles, computed in float64 on the host."""
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(
    x: Float[Array, "batch length heads dim"],
    cos: Float[HostOrDevice, "#batch length half"],
    sin: Float[HostOrDevice, "#batch length half"],
) -> Array:
    """Rotate the pairs (i, i + dim/2) of every head: the half-split convention of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)


def _attention(parameters: Params, x: Hidden, config: ModelConfig) -> Float[Array, "batch length heads_width"]:
    """Causal grouped-query attention, up to (not including) the output projection."""
    batch, length, _ = x.shape
    groups = config.num_heads // config.num_kv_heads

    def heads(name: str, count: int) -> Array:
        return apply(parameters[name], x).reshape(batch, length, count, config.head_dim)

    q, k = heads("q_proj", config.num_heads), heads("k_proj", config.num_kv_heads)
    v = heads("v_proj", config.num_kv_heads)
    if config.qk_norm:
        q = rms_norm(q, parameters["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, parameters["k_norm"], config.rms_norm_eps)
    cos, sin = rope_tables(length, config)
    q, k = rotate(q, cos[None], sin[None]), rotate(k, cos[None], sin[None])
    # One batched matrix product per step, [batch·kv heads, groups·length, dim]:
    # XLA's CPU backend is three times slower on 5-D einsums.
    q = q.reshape(batch, length, config.num_kv_heads, groups, config.head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * config.num_kv_heads, groups * length, config.head_dim)
    k, v = (x.transpose(0, 2, 1, 3).reshape(batch * config.num_kv_heads, length, config.head_dim) for x in (k, v))
    ahead = np.arange(length)[:, None] - np.arange(length)[None, :]  # query position minus key position
    visible = ahead >= 0
    if config.sliding_window is not None:
        visible &= ahead < config.sliding_window
    mixed = attend(q, k, v, np.tile(visible, (groups, 1)))
    mixed = mixed.reshape(batch, config.num_kv_heads, groups, length, config.head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, config.num_heads * config.head_dim)


def _sites(parameters: Params, x: HiddenInput, config: ModelConfig) -> tuple[Hidden, dict[str, Array]]:
    inputs: dict[str, Array] = {}
    inputs["attention"] = rms_norm(x, parameters["input_layernorm"], config.rms_norm_eps)
    inputs["attention_output"] = _attention(parameters["self_attn"], inputs["attention"], config)
    attended = apply(parameters["self_attn"]["o_proj"], inputs["attention_output"]) + x
    inputs["mlp"] = rms_norm(attended, parameters["post_attention_layernorm"], config.rms_norm_eps)
    mlp = parameters["mlp"]
    inputs["mlp_output"] = jax.nn.silu(apply(mlp["gate_proj"], inputs["mlp"])) * apply(mlp["up_proj"], inputs["mlp"])
    return attended + apply(mlp["down_proj"], inputs["mlp_output"]), inputs


def _output(parameters: Params, config: ModelConfig, x: HiddenInput) -> Hidden:
    return _sites(parameters, x, config)[0]


@functools.partial(jax.jit, static_argnames="config")
def block(parameters: Params, x: HiddenInput, config: ModelConfig) -> Hidden:
    """One transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`; over a mesh where it lies on one."""
    return spread(_output, parameters, config, (x,), (HIDDEN,), HIDDEN)


def block_inputs(parameters: Params, x: HiddenInput, config: ModelConfig) -> tuple[Hidden, dict[str, Array]]:
    """The block's output and the input `[batch, length, in]` of its linears at every site of `SITES`."""
    return _sites(parameters, x, config)


def probed(
    parameters: Params, x: HiddenInput, config: ModelConfig
) -> tuple[Hidden, Callable[[HiddenInput], tuple[Hidden, dict[str, Array]]], dict[str, Array]]:
    """One block whose linears' outputs can be differentiated by: (its output, pull, the linears' inputs by site).

    `pull(∂ℓ/∂output)` gives `∂ℓ/∂x` and the gradients `g = ∂ℓ/∂y` of the linears' outputs y by linear, all
    `[batch, length, ...]`: those of zeros that are added to them. No gradients of weights are computed.
    """
    batch, length, _ = x.shape

    def run(x: Array, probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        copy = {name: dict(value) if isinstance(value, dict) else value for name, value in parameters.items()}
        for name, probe in probes.items():
            group, leaf = name.split(".")
            copy[group][leaf] = {**copy[group][leaf], "probe": probe}
        return _sites(copy, x, config)

    zeros = {}
    for name in LINEARS:
        group, leaf = name.split(".")
        zeros[name] = jnp.zeros((batch, length, parameters[group][leaf]["weight"].shape[0]), x.dtype)
    return jax.vjp(run, jnp.asarray(x), zeros, has_aux=True)


@jax.jit
def embed(table: Float[HostOrDevice, "vocab width"], tokens: Int[HostOrDevice, "batch length"]) -> Hidden:
    """Rows of the embedding matrix. Tokens must lie inside the vocabulary (checked where token streams are made)."""
    return jnp.take(table, tokens, axis=0, mode="clip")


def head(params: Params) -> dict[str, HostOrDevice]:
    """The parameters of the last step: `{"norm": [width], "head": [vocab, width]}`."""
    return {"norm": params["norm"], "head": params.get("head", params["embed"])}


@functools.partial(jax.jit, static_argnames="config")
def logits(
    parameters: dict[str, HostOrDevice], x: HiddenInput, config: ModelConfig
) -> Float[Array, "batch length vocab"]:
    """Final norm and output projection, in float32; `parameters` as returned by `head`."""
    hidden = rms_norm(x, parameters["norm"], config.rms_norm_eps)
    return linear(hidden, parameters["head"]).astype(jnp.float32)


def forward(params: Params, tokens: Int[HostOrDevice, "batch length"], config: ModelConfig) -> Array:
    """Logits `[batch, length, vocab]` of every position; a linear's weight is an Array or a QuantizedMatrix."""
    x = embed(params["embed"], tokens)
    for parameters in params["blocks"]:
        x = placed(x, parameters)
        x = block(parameters, x, config)
    return logits(head(params), x, config)


def layer_names(config: ModelConfig) -> list[str]:
    """The names of all linears, in the order of the forward pass: `layers.<i>.<self_attn|mlp>.<name>_proj`."""
    return [f"layers.{i}.{linear}" for i in range(config.num_layers) for linear in LINEARS]
