"""Phi-3 and Phi-4: Llama with fused q, k, v and fused gate and up, and heads that may be rotated in part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.families.base import FAMILIES, Residual, Shape
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.models.families.windows import windows_of_layers
from qjax.models.linear import affine

__all__ = ["Phi3"]


@FAMILIES.register("Phi3ForCausalLM")
class Phi3(Llama):
    """Llama whose `qkv_proj` has rows q, k, v and `gate_up_proj` rows gate, up; each is one linear."""

    model_type = "phi3"
    title = "Phi-3 and Phi-4 (Phi3ForCausalLM)"
    whole = "rows of q, k and v, of gate and up, lie one after the other in one matrix"
    gguf = None
    attention_bias = False
    mlp_bias = False

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """`sliding_window` of all layers; null is none."""
        if fields.table.get("sliding_window") is None:
            return [None]
        return windows_of_layers(fields, fields.integer("sliding_window"), full=0, layers=layers)

    def block_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        width, middle = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.qkv_proj.weight": (queries + 2 * keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_up_proj.weight": (2 * middle, width),
            "mlp.down_proj.weight": (width, middle),
        }

    def queries_keys_values(self, parameters: Any, x: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
        """As `Llama.queries_keys_values`."""
        batch, length, _ = x.shape
        heads, keys = config.num_heads, config.num_kv_heads
        fused = affine(parameters["qkv_proj"], x).reshape(batch, length, heads + 2 * keys, config.head_dim)
        return fused[:, :, :heads], fused[:, :, heads : heads + keys], fused[:, :, heads + keys :]

    def mlp(self, parameters: Any, x: Array) -> Array:
        """As `Llama.mlp`."""
        gate, up = jnp.split(affine(parameters["gate_up_proj"], x), 2, axis=-1)
        return affine(parameters["down_proj"], jax.nn.silu(gate) * up)

    def residual(self) -> Residual | None:
        """As `Family.residual`: of the fused linears only the stream could be rotated."""
        return None
