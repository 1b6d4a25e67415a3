"""Gemma 2: four norms in a block, capped scores and logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.context import Cached, Context
from qjax.models.families.base import FAMILIES, Shape
from qjax.models.families.fields import Fields
from qjax.models.families.gemma import Gemma
from qjax.models.families.windows import layer_types
from qjax.typing import HostOrDevice

__all__ = ["Gemma2"]


@FAMILIES.register("Gemma2ForCausalLM")
class Gemma2(Gemma):
    """`x + norm(attention(norm(x)))`, then `x + norm(mlp(norm(x)))`.

    Attributes:
      sliding_every: the layer of as many that has no window.
      largest: blocks of the model whose scores are scaled by another root than that of the head's width.
    """

    model_type = "gemma2"
    title = "Gemma2ForCausalLM"
    gguf = "gemma2"
    sliding_every: ClassVar[int] = 2
    largest: ClassVar[int] = 46

    def default_kv_heads(self, heads: int) -> int | None:
        """The key is needed."""
        return None

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """The window, the caps, and the scale of the scores: files have none, and the largest model another."""
        head_dim, width = entry("attention.key_length"), entry("embedding_length")
        largest = entry("block_count") == self.largest
        return super().gguf_table(entry) | {
            "sliding_window": int(entry("attention.sliding_window", 4096)),
            "query_pre_attn_scalar": width / entry("attention.head_count") if largest else head_dim,
            "attn_logit_softcapping": entry("attn_logit_softcapping", 50.0) or None,
            "final_logit_softcapping": entry("final_logit_softcapping", 30.0) or None,
        }

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """`sliding_window` in the layers of `layer_types`; where it is absent in every second, the first included."""
        every = fields.integer("sliding_window_pattern", self.sliding_every)
        default = [
            "full_attention" if (index + 1) % every == 0 else "sliding_attention"
            for index in range(min(layers, 10_000))
        ]
        window = fields.integer("sliding_window", 4096)
        return [window if t == "sliding_attention" else None for t in layer_types(fields, layers, default)]

    def options(self, fields: Fields) -> dict[str, Any]:
        """As `Llama.options`; null leaves scores or logits as they are."""
        caps = {
            name: None if key in fields.table and fields.table[key] is None else fields.number(key, default)
            for name, key, default in (
                ("attention_cap", "attn_logit_softcapping", 50.0),
                ("logits_cap", "final_logit_softcapping", 30.0),
            )
        }
        scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
        return {**super().options(fields), **caps, "attention_scale": scale}

    def block_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """As `Family.block_tensors`."""
        names = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return super().block_tensors(config) | {f"{name}.weight": (config.hidden_size,) for name in names}

    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Array:
        """One block."""
        norm = lambda x, name: self.norm(x, parameters[name], context.config)  # noqa: E731
        mixed = self.attention(parameters["self_attn"], norm(x, "input_layernorm"), context)
        x = norm(mixed, "post_attention_layernorm") + x
        hidden = self.mlp(parameters["mlp"], norm(x, "pre_feedforward_layernorm"))
        return norm(hidden, "post_feedforward_layernorm") + x
