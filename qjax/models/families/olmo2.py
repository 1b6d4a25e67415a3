"""OLMo 2: no norms before attention and MLP but behind them, and norms over all of q and of k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Shape
from qjax.models.families.llama import Llama
from qjax.models.linear import affine
from qjax.typing import HostOrDevice

__all__ = ["Olmo2"]


@FAMILIES.register("Olmo2ForCausalLM")
class Olmo2(Llama):
    """`x + norm(attention(x))`, then `x + norm(mlp(x))`; q and k are normed whole, before heads are split."""

    model_type = "olmo2"
    title = "OLMo 2 (Olmo2ForCausalLM)"
    whole = "norms of queries and keys are over all heads"
    gguf = "olmo2"
    gguf_paired = ()
    mlp_bias = False

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def block_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        tensors = super().block_tensors(config)
        tensors["post_feedforward_layernorm.weight"] = tensors.pop("input_layernorm.weight")
        return tensors | {
            "self_attn.q_norm.weight": (config.num_heads * config.head_dim,),
            "self_attn.k_norm.weight": (config.num_kv_heads * config.head_dim,),
        }

    def queries_keys_values(self, parameters: Any, x: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
        """As `Llama.queries_keys_values`."""
        split = lambda y: y.reshape(*x.shape[:2], -1, config.head_dim)  # noqa: E731
        q = self.norm(affine(parameters["q_proj"], x), parameters["q_norm"], config)
        k = self.norm(affine(parameters["k_proj"], x), parameters["k_norm"], config)
        return split(q), split(k), split(affine(parameters["v_proj"], x))

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        config = context.config
        mixed = self.attention(parameters["self_attn"], x, context)
        x = self.norm(mixed, parameters["post_attention_layernorm"], config) + x
        return self.norm(self.mlp(parameters["mlp"], x), parameters["post_feedforward_layernorm"], config) + x
