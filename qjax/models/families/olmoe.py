"""OLMoE (2409.02060): Llama with norms of whole q and k, and a mixture of many small experts in every block."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.families.base import FAMILIES, Shape
from qjax.models.families.fields import Fields
from qjax.models.families.mixture import Mixture, MixtureConfig
from qjax.models.norms import rms_norm

__all__ = ["OLMoE"]


@FAMILIES.register("OlmoeForCausalLM")
class OLMoE(Mixture):
    """Norms of q and k over all heads at once, before these are split."""

    model_type = "olmoe"
    title = "OlmoeForCausalLM"
    counts = ("num_experts", "num_local_experts")
    default_active = 8
    mlp_bias = False
    qk_norm = True

    def config(self, fields: Fields, architecture: str) -> MixtureConfig:
        """As `Family.config`: refuses clipped queries, keys and values."""
        if fields.table.get("clip_qkv") is not None:
            raise ModelFileError(f"{fields.where}: clip_qkv {fields.table['clip_qkv']!r} is not supported; null is")
        return super().config(fields, architecture)

    def block_tensors(self, config: Any) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        widths = {"q_norm": config.num_heads * config.head_dim, "k_norm": config.num_kv_heads * config.head_dim}
        own = {f"self_attn.{name}.weight": (width,) for name, width in widths.items()}
        return super().block_tensors(config) | own

    def normed(self, heads: Array, gain: Array, config: Any) -> Array:
        """All heads of q or k as one vector."""
        whole = heads.reshape(*heads.shape[:2], -1)
        return rms_norm(whole, gain, config.rms_norm_eps).reshape(heads.shape)
