"""OPT (2205.01068): layer norms, learned positions, biases everywhere, an MLP without a gate."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Family, Shape
from qjax.models.families.fields import Fields
from qjax.models.linear import affine, linear, rows
from qjax.models.norms import layer_norm
from qjax.typing import HostOrDevice

__all__ = ["OPT", "OPTConfig"]

_OFFSET = 2  # rows of the table of positions before that of position 0
_EPS = 1e-5
_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


@dataclasses.dataclass(frozen=True, repr=False)
class OPTConfig(ModelConfig):
    """The configuration of an OPT: the shapes of `ModelConfig`, and choices of its own.

    Attributes:
      embedding_size: width of the embedding; where it is not the model's, `project_in` and `project_out` lie between.
      norm_first: norms come before attention and MLP (all models but 350M, whose norms follow the residual sums).
      final_norm: a norm follows the last block.
      gains: norms have gains and biases.
      activation: of the MLP, "relu" or "gelu".
    """

    embedding_size: int = 0
    norm_first: bool = True
    final_norm: bool = True
    gains: bool = True
    activation: str = "relu"


@FAMILIES.register("OPTForCausalLM")
class OPT(Family):
    """`x + attention(norm(x))`, then `x + fc2(relu(fc1(norm(x))))`, or with the norms behind the sums."""

    model_type = "opt"
    title = "OPTForCausalLM"
    prefix = "model.decoder.layers.{index}."
    Config = OPTConfig

    def config(self, fields: Fields, architecture: str) -> OPTConfig:
        """As `Family.config`."""
        width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if width % heads:
            raise ModelFileError(f"{fields.where}: the width {width} does not divide among {heads} attention heads")
        norm_first, biases = fields.flag("do_layer_norm_before", True), fields.flag("enable_bias", True)
        return OPTConfig(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=fields.integer("ffn_dim"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            max_positions=fields.integer("max_position_embeddings", 2048),
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            qkv_bias=biases,
            attention_bias=biases,
            mlp_bias=biases,
            embedding_size=fields.integer("word_embed_proj_dim", width),
            norm_first=norm_first,
            final_norm=norm_first and not fields.flag("_remove_final_layer_norm"),
            gains=fields.flag("layer_norm_elementwise_affine", True),
            activation=fields.choice("activation_function", tuple(_ACTIVATIONS), "relu"),
        )

    def block_tensors(self, config: OPTConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        width, middle = config.hidden_size, config.intermediate_size
        tensors: dict[str, Shape] = {}
        for name in ("self_attn_layer_norm", "final_layer_norm") if config.gains else ():
            tensors |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        shapes = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, (out, inner) in {**shapes, "fc1": (middle, width), "fc2": (width, middle)}.items():
            tensors[f"{name}.weight"] = (out, inner)
            if config.mlp_bias:
                tensors[f"{name}.bias"] = (out,)
        return tensors

    def edge_tensors(self, config: OPTConfig) -> dict[str, tuple[str, Shape]]:
        """As `Family.edge_tensors`."""
        width, inner, prefix = config.hidden_size, config.embedding_size, "model.decoder."
        edges: dict[str, tuple[str, Shape]] = {
            f"{prefix}embed_tokens.weight": ("embed/tokens", (config.vocab_size, inner)),
            f"{prefix}embed_positions.weight": ("embed/positions", (config.max_positions + _OFFSET, width)),
        }
        if inner != width:
            edges[f"{prefix}project_in.weight"] = ("embed/project_in", (width, inner))
            edges[f"{prefix}project_out.weight"] = ("norm/project_out", (inner, width))
        if config.final_norm and config.gains:
            edges |= {f"{prefix}final_layer_norm.{part}": (f"norm/{part}", (width,)) for part in ("weight", "bias")}
        if not config.tie_embeddings:
            edges["lm_head.weight"] = ("head", (config.vocab_size, inner))
        return edges

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: OPTConfig) -> Array:
        """Rows of the embedding, widened where it is narrower than the model, plus those of their positions."""
        x = rows(parameters["tokens"], tokens)
        x = linear(x, parameters["project_in"]) if "project_in" in parameters else x
        place = jnp.take(parameters["positions"], positions + _OFFSET, axis=0, mode="clip")
        return x + jnp.broadcast_to(place, x.shape)

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config: Any = context.config  # an OPTConfig, of this device's part
        attention = parameters["self_attn"]
        batch, length, _ = x.shape
        norms = [lambda x, name=name: layer_norm(x, parameters.get(name, {}), _EPS) for name in _NORMS]
        before, after = (norms, [lambda x: x] * 2) if config.norm_first else ([lambda x: x] * 2, norms)
        normal = before[0](x)
        q, k, v = (
            affine(attention[name], normal).reshape(batch, length, config.num_heads, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = after[0](x + affine(attention["out_proj"], context.attend(q, k, v)))
        hidden = _ACTIVATIONS[config.activation](affine(parameters["fc1"], before[1](x)))
        return after[1](x + affine(parameters["fc2"], hidden))

    def final(self, parameters: Any, x: HostOrDevice, config: OPTConfig) -> Array:
        """The final norm where there is one, narrowed to the embedding's width."""
        x = layer_norm(x, parameters, _EPS) if config.final_norm else jnp.asarray(x)
        return linear(x, parameters["project_out"]) if "project_out" in parameters else x


_NORMS = ("self_attn_layer_norm", "final_layer_norm")
