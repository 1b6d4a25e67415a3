"""Llama 1 to 3 and SmolLM2: RMS norms before attention and before a gated MLP, rotary positions, grouped queries."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Family, Shape
from qjax.models.families.fields import Fields
from qjax.models.linear import affine
from qjax.models.norms import rms_norm
from qjax.typing import HostOrDevice

__all__ = ["Llama"]


@FAMILIES.register("LlamaForCausalLM")
class Llama(Family):
    """`x + attention(norm(x))`, then `x + down(silu(gate(norm(x))) · up(norm(x)))`.

    Attributes:
      qkv_bias: whether q, k and v always have biases.
      attention_bias: whether `attention_bias` of the configuration is heeded.
      mlp_bias: whether `mlp_bias` is.
      qk_norm: whether every head of q and k passes an RMS norm before the rotation.
      head_dim: the width of a head where the configuration says none; None divides the width by the heads.
    """

    model_type = "llama"
    title = "Llama 1/2/3 and SmolLM2 (LlamaForCausalLM)"
    gguf = "llama"
    gguf_paired = ("self_attn.q_proj", "self_attn.k_proj")
    qkv_bias: ClassVar[bool] = False
    attention_bias: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False
    head_dim: ClassVar[int | None] = None

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        """As `Family.config`: refuses other activations, partial rotation and mixed windows."""
        fields.choice("hidden_act", ("silu", "swish"), "silu")
        heads, layers, width = (
            fields.integer(key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")
        )
        kv_heads = fields.integer("num_key_value_heads", self.default_kv_heads(heads))
        if heads % kv_heads:
            raise ModelFileError(
                f"{fields.where}: {heads} attention heads cannot share {kv_heads} key/value heads evenly"
            )
        head_dim = fields.integer("head_dim", self.head_dim or max(width // heads, 1))
        if head_dim % 2 or (fields.table.get("head_dim") is None and self.head_dim is None and width % heads):
            raise ModelFileError(
                f"{fields.where}: head_dim must be an even integer, found {width}/{heads} = {width / heads:g} "
                f"with head_dim {fields.table.get('head_dim')!r}"
            )
        positions = fields.integer("max_position_embeddings", 2048)
        theta, scaling = _rope(fields, positions)
        biases = fields.flag("attention_bias") and self.attention_bias
        return ModelConfig(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_positions=positions,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=biases or self.qkv_bias,
            attention_bias=biases,
            mlp_bias=fields.flag("mlp_bias") and self.mlp_bias,
            qk_norm=self.qk_norm,
            sliding_window=self.window(fields, layers),
        )

    def default_kv_heads(self, heads: int) -> int | None:
        """Key and value heads where the configuration says none: as many as heads. None asks for the key."""
        return heads

    def window(self, fields: Fields, layers: int) -> int | None:
        """The sliding window that all layers have, None without one."""
        return None

    def block_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        width, middle = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv, mlp = config.qkv_bias or config.attention_bias, config.mlp_bias
        tensors: dict[str, Shape] = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        for name, out, inner, bias in (
            ("self_attn.q_proj", queries, width, qkv),
            ("self_attn.k_proj", keys, width, qkv),
            ("self_attn.v_proj", keys, width, qkv),
            ("self_attn.o_proj", width, queries, config.attention_bias),
            ("mlp.gate_proj", middle, width, mlp),
            ("mlp.up_proj", middle, width, mlp),
            ("mlp.down_proj", width, middle, mlp),
        ):
            tensors[f"{name}.weight"] = (out, inner)
            if bias:
                tensors[f"{name}.bias"] = (out,)
        if config.qk_norm:
            tensors |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
        return tensors

    def edge_tensors(self, config: ModelConfig) -> dict[str, tuple[str, Shape]]:
        """As `Family.edge_tensors`."""
        table = (config.vocab_size, config.hidden_size)
        edges: dict[str, tuple[str, Shape]] = {
            "model.embed_tokens.weight": ("embed", table),
            "model.norm.weight": ("norm", (config.hidden_size,)),
        }
        return edges if config.tie_embeddings else edges | {"lm_head.weight": ("head", table)}

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: ModelConfig) -> Array:
        """Rows of the embedding matrix."""
        return jnp.take(parameters, tokens, axis=0, mode="clip")

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config, attention = context.config, parameters["self_attn"]
        batch, length, _ = x.shape
        normal = rms_norm(x, parameters["input_layernorm"], config.rms_norm_eps)
        q, k, v = (
            affine(attention[name], normal).reshape(batch, length, heads, config.head_dim)
            for name, heads in (
                ("q_proj", config.num_heads),
                ("k_proj", config.num_kv_heads),
                ("v_proj", config.num_kv_heads),
            )
        )
        if config.qk_norm:
            q, k = (self.normed(x, attention[name], config) for x, name in ((q, "q_norm"), (k, "k_norm")))
        q, k = context.rotary(q, k)
        x = affine(attention["o_proj"], context.attend(q, k, v)) + x
        normal = rms_norm(x, parameters["post_attention_layernorm"], config.rms_norm_eps)
        return x + self.mlp(parameters, normal, config)

    def normed(self, heads: Array, gain: Array, config: ModelConfig) -> Array:
        """The normed heads of q or k `[batch, length, heads, dim]`, where the family has norms of these: each head."""
        return rms_norm(heads, gain, config.rms_norm_eps)

    def mlp(self, parameters: Any, x: Array, config: ModelConfig) -> Array:
        """What follows attention, of its normed input."""
        mlp = parameters["mlp"]
        return affine(mlp["down_proj"], jax.nn.silu(affine(mlp["gate_proj"], x)) * affine(mlp["up_proj"], x))

    def final(self, parameters: Any, x: HostOrDevice, config: ModelConfig) -> Array:
        """The final norm."""
        return rms_norm(x, parameters, config.rms_norm_eps)


def _rope(fields: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of either layout: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`."""
    table, where = fields.table, fields.where
    raw = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelFileError(f"{where}: rope parameters that differ between layers are not supported, found {raw!r}")
    rope = Fields(raw, f"{where}, rope parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelFileError(f"{where}: a rotary embedding of a part of each head is not supported")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise ModelFileError(f"{where}: rope scaling of type {kind!r} is not supported; default and llama3 are")
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings", positions),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelFileError(f"{where}: rope scaling needs high_freq_factor > low_freq_factor, found {scaling}")
    return theta, scaling
