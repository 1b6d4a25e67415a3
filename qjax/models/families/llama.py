"""Llama 1 to 3 and SmolLM2: RMS norms before attention and before a gated MLP, rotary positions, grouped queries."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.config import AttentionKind, ModelConfig, Scaling
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Family, Residual, Shape
from qjax.models.families.fields import Fields
from qjax.models.families.rope import rope, rotary_dim
from qjax.models.linear import affine, rows
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
        """As `Family.config`: refuses other activations."""
        self.check_activation(fields)
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
        turned = rotary_dim(fields, head_dim)
        theta, scaling = self.rope(fields, positions, turned or head_dim)
        kinds, plain = self.kinds(fields, layers, theta, scaling), AttentionKind(None, True, theta, scaling)
        biases = fields.flag("attention_bias") and self.attention_bias
        alike = len(set(kinds)) == 1 and dataclasses.replace(kinds[0], window=None) == plain
        config = self.Config(
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
            sliding_window=kinds[0].window if alike else None,
            rotary_dim=turned,
            attention_kinds=None if alike else kinds,
        )
        return dataclasses.replace(config, **self.options(fields))

    def rope(self, fields: Fields, positions: int, dims: int) -> tuple[float, Scaling | None]:
        """(theta, scaling) of the rotation."""
        return rope(fields, positions, dims)

    def options(self, fields: Fields) -> dict[str, Any]:
        """Further fields of `Config`, and those that a family sets in its own way."""
        return {}

    def check_activation(self, fields: Fields) -> None:
        """Raises ModelFileError for an activation that the family does not have here."""
        fields.choice("hidden_act", ("silu", "swish"), "silu")

    def default_kv_heads(self, heads: int) -> int | None:
        """Key and value heads where the configuration says none: as many as heads. None asks for the key."""
        return heads

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """The sliding window of every layer, None without one; one value where all have the same."""
        return [None]

    def kinds(self, fields: Fields, layers: int, theta: float, scaling: Scaling | None) -> tuple[AttentionKind, ...]:
        """The attention of every layer, or the one of all."""
        return tuple(AttentionKind(window, True, theta, scaling) for window in self.windows(fields, layers))

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
        return rows(parameters, tokens)

    def norm(self, x: HostOrDevice, gain: HostOrDevice, config: ModelConfig) -> Array:
        """The norm of a family."""
        return rms_norm(x, gain, config.rms_norm_eps)

    def queries_keys_values(self, parameters: Any, x: Any, config: Any) -> tuple[Array, Array, Array]:
        """Heads `[batch, length, heads, dim]` before the rotation; `parameters` are those of the attention."""
        batch, length, _ = x.shape
        q, k, v = (
            affine(parameters[name], x).reshape(batch, length, heads, config.head_dim)
            for name, heads in (
                ("q_proj", config.num_heads),
                ("k_proj", config.num_kv_heads),
                ("v_proj", config.num_kv_heads),
            )
        )
        if config.qk_norm:
            q, k = (self.normed(x, parameters[name], config) for x, name in ((q, "q_norm"), (k, "k_norm")))
        return q, k, v

    def normed(self, heads: Array, gain: Array, config: ModelConfig) -> Array:
        """The normed heads of q or k `[batch, length, heads, dim]`, where the family has norms of these: each head."""
        return self.norm(heads, gain, config)

    def attention(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """The attention's output for normed x; `parameters` are those of the attention."""
        q, k, v = self.queries_keys_values(parameters, x, context.config)
        q, k = context.rotary(q, k)
        return affine(parameters["o_proj"], context.attend(q, k, v))

    def feed_forward(self, parameters: Any, x: Array, config: Any) -> Array:
        """What follows attention, of its normed input; `parameters` are those of the block."""
        return self.mlp(parameters["mlp"], x)

    def mlp(self, parameters: Any, x: Array) -> Array:
        """The gated MLP's output for normed x; `parameters` are those of the MLP."""
        gate, up = affine(parameters["gate_proj"], x), affine(parameters["up_proj"], x)
        return affine(parameters["down_proj"], self.activation(gate) * up)

    def activation(self, x: Array) -> Array:
        """The activation of the gate."""
        return jax.nn.silu(x)

    def added(self, x: HostOrDevice, branch: Array, config: Any) -> Array:
        """The residual stream with the output of attention or MLP."""
        return branch + x

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config = context.config
        normal = self.norm(x, parameters["input_layernorm"], config)
        x = self.added(x, self.attention(parameters["self_attn"], normal, context), config)
        normal = self.norm(x, parameters["post_attention_layernorm"], config)
        return self.added(x, self.feed_forward(parameters, normal, config), config)

    def residual(self) -> Residual | None:
        """As `Family.residual`; a family with another block says its own."""
        if type(self).block is not Llama.block or type(self).feed_forward is not Llama.feed_forward:
            return None
        readers = {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }
        return Residual(readers, ("self_attn.o_proj", "mlp.down_proj"), "self_attn.v_proj", "self_attn.o_proj")

    def final(self, parameters: Any, x: HostOrDevice, config: ModelConfig) -> Array:
        """The final norm."""
        return self.norm(x, parameters, config)
