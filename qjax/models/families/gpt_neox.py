"""GPT-NeoX and Pythia: layer norms, attention and MLP side by side, fused q, k, v, heads rotated in part."""

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
from qjax.models.families.rope import rope, rotary_dim
from qjax.models.linear import affine, rows
from qjax.models.norms import layer_norm
from qjax.typing import HostOrDevice

__all__ = ["GPTNeoX", "GPTNeoXConfig"]


@dataclasses.dataclass(frozen=True, repr=False)
class GPTNeoXConfig(ModelConfig):
    """The configuration of a GPT-NeoX; `rms_norm_eps` is that of its layer norms.

    Attributes:
      parallel: attention and MLP both read the block's input.
    """

    parallel: bool = True


@FAMILIES.register("GPTNeoXForCausalLM")
class GPTNeoX(Family):
    """`x + attention(norm₁(x)) + mlp(norm₂(x))`, or one after the other."""

    model_type = "gpt_neox"
    title = "GPT-NeoX and Pythia (GPTNeoXForCausalLM)"
    prefix = "gpt_neox.layers.{index}."
    Config = GPTNeoXConfig
    ignored = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")

    def config(self, fields: Fields, architecture: str) -> GPTNeoXConfig:
        """As `Family.config`."""
        fields.choice("hidden_act", ("gelu",), "gelu")
        width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if width % heads:
            raise ModelFileError(f"{fields.where}: the width {width} does not divide among {heads} attention heads")
        head_dim, positions = width // heads, fields.integer("max_position_embeddings", 2048)
        turned = rotary_dim(fields, head_dim, fields.number("rotary_pct", 0.25))
        theta, scaling = rope(fields, positions, turned or head_dim, fields.number("rotary_emb_base", 10_000.0))
        biases = fields.flag("attention_bias", True)
        return GPTNeoXConfig(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=fields.number("layer_norm_eps", 1e-5),
            max_positions=positions,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=biases,
            attention_bias=biases,
            mlp_bias=True,
            rotary_dim=turned,
            parallel=fields.flag("use_parallel_residual", True),
        )

    def block_tensors(self, config: GPTNeoXConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        width, middle = config.hidden_size, config.intermediate_size
        tensors: dict[str, Shape] = {}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for name, out, inner, bias in (
            ("attention.query_key_value", 3 * width, width, config.qkv_bias),
            ("attention.dense", width, width, config.attention_bias),
            ("mlp.dense_h_to_4h", middle, width, True),
            ("mlp.dense_4h_to_h", width, middle, True),
        ):
            tensors[f"{name}.weight"] = (out, inner)
            if bias:
                tensors[f"{name}.bias"] = (out,)
        return tensors

    def edge_tensors(self, config: GPTNeoXConfig) -> dict[str, tuple[str, Shape]]:
        """As `Family.edge_tensors`."""
        table, width = (config.vocab_size, config.hidden_size), (config.hidden_size,)
        edges: dict[str, tuple[str, Shape]] = {
            "gpt_neox.embed_in.weight": ("embed", table),
            "gpt_neox.final_layer_norm.weight": ("norm/weight", width),
            "gpt_neox.final_layer_norm.bias": ("norm/bias", width),
        }
        return edges if config.tie_embeddings else edges | {"embed_out.weight": ("head", table)}

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: ModelConfig) -> Array:
        """Rows of the embedding matrix."""
        return rows(parameters, tokens)

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config: Any = context.config
        attention, mlp = parameters["attention"], parameters["mlp"]
        normal = layer_norm(x, parameters["input_layernorm"], config.rms_norm_eps)
        heads = (*x.shape[:2], config.num_heads, 3, config.head_dim)
        fused = affine(attention["query_key_value"], normal).reshape(heads)
        q, k = context.rotary(fused[:, :, :, 0], fused[:, :, :, 1])
        mixed = affine(attention["dense"], context.attend(q, k, fused[:, :, :, 2])) + x
        read = x if config.parallel else mixed
        normal = layer_norm(read, parameters["post_attention_layernorm"], config.rms_norm_eps)
        hidden = jax.nn.gelu(affine(mlp["dense_h_to_4h"], normal), approximate=False)
        return mixed + affine(mlp["dense_4h_to_h"], hidden)

    def final(self, parameters: Any, x: HostOrDevice, config: GPTNeoXConfig) -> Array:
        """The final norm."""
        return layer_norm(x, parameters, config.rms_norm_eps)
