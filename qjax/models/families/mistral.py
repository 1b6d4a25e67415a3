"""Mistral: Llama with a sliding window on all layers."""

from __future__ import annotations

from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.models.families.windows import windows_of_layers

__all__ = ["Mistral"]

_WINDOW = 4096  # what the family means when the key is absent


@FAMILIES.register("MistralForCausalLM")
class Mistral(Llama):
    """Llama with a window, without biases. Its GGUF files are Llama's."""

    model_type = "mistral"
    title = "MistralForCausalLM"
    gguf = None
    attention_bias = False
    mlp_bias = False

    def default_kv_heads(self, heads: int) -> int | None:
        """The key is needed."""
        return None

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """`sliding_window`: null is none, an absent key 4096."""
        if "sliding_window" in fields.table and fields.table["sliding_window"] is None:
            return [None]
        return windows_of_layers(fields, fields.integer("sliding_window", _WINDOW), full=0, layers=layers)
