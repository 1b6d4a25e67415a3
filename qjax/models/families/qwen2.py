"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window where it is switched on."""

from __future__ import annotations

from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.models.families.windows import windows_of_layers

__all__ = ["Qwen2"]


@FAMILIES.register("Qwen2ForCausalLM")
class Qwen2(Llama):
    """Llama with biases on q, k and v."""

    model_type = "qwen2"
    title = "Qwen2ForCausalLM"
    gguf = "qwen2"
    gguf_paired = ()
    qkv_bias = True
    attention_bias = False
    mlp_bias = False

    def default_kv_heads(self, heads: int) -> int | None:
        """The key is needed."""
        return None

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """`sliding_window` where `use_sliding_window` is true, from layer `max_window_layers` on."""
        if not fields.flag("use_sliding_window") or fields.table.get("sliding_window") is None:
            return [None]
        full = fields.table.get("max_window_layers", layers)
        return windows_of_layers(fields, fields.integer("sliding_window"), full=full, layers=layers)
