"""Falcon: layer norms, attention and MLP side by side, fused q, k, v in groups of queries with one key and value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Family, Shape
from qjax.models.families.fields import Fields
from qjax.models.families.rope import rope
from qjax.models.linear import affine, rows
from qjax.models.norms import layer_norm
from qjax.typing import HostOrDevice

__all__ = ["Falcon", "FalconConfig"]


@dataclasses.dataclass(frozen=True, repr=False)
class FalconConfig(ModelConfig):
    """The configuration of a Falcon; `rms_norm_eps` is that of its layer norms.

    Attributes:
      two_norms: attention and MLP have a norm each (40B, 180B), not one together (7B, 11B).
    """

    two_norms: bool = False


@FAMILIES.register("FalconForCausalLM")
class Falcon(Family):
    """`x + attention(norm(x)) + mlp(norm(x))`, with rotary positions."""

    model_type = "falcon"
    title = "FalconForCausalLM"
    prefix = "transformer.h.{index}."
    Config = FalconConfig

    def config(self, fields: Fields, architecture: str) -> FalconConfig:
        """As `Family.config`: refuses ALiBi and attention before the MLP."""
        fields.choice("activation", ("gelu",), "gelu")
        if fields.flag("alibi") or not fields.flag("parallel_attn", True):
            raise ModelFileError(
                f"{fields.where}: alibi and attention before the MLP (parallel_attn false) are not supported; "
                "Falcons with rotary positions and attention beside the MLP are (7B, 11B, 40B, 180B)"
            )
        width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if width % heads:
            raise ModelFileError(f"{fields.where}: the width {width} does not divide among {heads} attention heads")
        newer = fields.flag("new_decoder_architecture")
        shared = 1 if fields.flag("multi_query", True) else heads
        kv_heads = fields.integer("num_kv_heads", heads) if newer else shared
        positions, biases = fields.integer("max_position_embeddings", 2048), fields.flag("bias")
        theta, scaling = rope(fields, positions, width // heads)
        return FalconConfig(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("ffn_hidden_size", 4 * width),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
            max_positions=positions,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            qkv_bias=biases,
            attention_bias=biases,
            mlp_bias=biases,
            two_norms=newer and fields.integer("num_ln_in_parallel_attn", 2) == 2,
        )

    def block_tensors(self, config: FalconConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        width, middle = config.hidden_size, config.intermediate_size
        tensors: dict[str, Shape] = {}
        for name in ("ln_attn", "ln_mlp") if config.two_norms else ("input_layernorm",):
            tensors |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for name, out, inner in (
            ("self_attention.query_key_value", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, width),
            ("self_attention.dense", width, width),
            ("mlp.dense_h_to_4h", middle, width),
            ("mlp.dense_4h_to_h", width, middle),
        ):
            tensors[f"{name}.weight"] = (out, inner)
            if config.mlp_bias:
                tensors[f"{name}.bias"] = (out,)
        return tensors

    def edge_tensors(self, config: FalconConfig) -> dict[str, tuple[str, Shape]]:
        """As `Family.edge_tensors`."""
        table, width = (config.vocab_size, config.hidden_size), (config.hidden_size,)
        edges: dict[str, tuple[str, Shape]] = {
            "transformer.word_embeddings.weight": ("embed", table),
            "transformer.ln_f.weight": ("norm/weight", width),
            "transformer.ln_f.bias": ("norm/bias", width),
        }
        return edges if config.tie_embeddings else edges | {"lm_head.weight": ("head", table)}

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: ModelConfig) -> Array:
        """Rows of the embedding matrix."""
        return rows(parameters, tokens)

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config: Any = context.config
        attention, mlp = parameters["self_attention"], parameters["mlp"]
        first, second = ("ln_attn", "ln_mlp") if config.two_norms else ("input_layernorm", "input_layernorm")
        normal = layer_norm(x, parameters[first], config.rms_norm_eps)
        (batch, length), groups, dim = x.shape[:2], config.num_kv_heads, config.head_dim
        fused = affine(attention["query_key_value"], normal).reshape(batch, length, groups, -1, dim)
        q = fused[:, :, :, :-2].reshape(batch, length, config.num_heads, dim)
        q, k = context.rotary(q, fused[:, :, :, -2])
        mixed = affine(attention["dense"], context.attend(q, k, fused[:, :, :, -1]))
        normal = normal if first == second else layer_norm(x, parameters[second], config.rms_norm_eps)
        hidden = jax.nn.gelu(affine(mlp["dense_h_to_4h"], normal), approximate=False)
        return affine(mlp["dense_4h_to_h"], hidden) + mixed + x

    def final(self, parameters: Any, x: HostOrDevice, config: FalconConfig) -> Array:
        """The final norm."""
        return layer_norm(x, parameters, config.rms_norm_eps)
