"""Qwen3: Llama with RMS norms of every q and k head, heads of 128, and Qwen2's windows."""

from __future__ import annotations

from qjax.models.families.base import FAMILIES
from qjax.models.families.qwen2 import Qwen2

__all__ = ["Qwen3"]


@FAMILIES.register("Qwen3ForCausalLM")
class Qwen3(Qwen2):
    """Llama with norms of q and k."""

    model_type = "qwen3"
    title = "Qwen3ForCausalLM"
    gguf = "qwen3"
    qkv_bias = False
    attention_bias = True
    qk_norm = True
    head_dim = 128
