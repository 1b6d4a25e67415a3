"""Gemma 3 (text): Gemma 2 with norms of q and k instead of caps, five windows to a full layer, two rotary bases."""

from __future__ import annotations

from typing import Any

from qjax.models.config import AttentionKind, Scaling
from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.gemma import Gemma
from qjax.models.families.gemma2 import Gemma2
from qjax.models.families.rope import rope_of_layers

__all__ = ["Gemma3"]

_LOCAL, _GLOBAL = 10_000.0, 1_000_000.0


@FAMILIES.register("Gemma3ForCausalLM")
class Gemma3(Gemma2):
    """Gemma 2's block; layers with a window have a rotary base of their own, which is never scaled."""

    model_type = "gemma3_text"
    title = "Gemma3ForCausalLM (text)"
    qk_norm = True
    gguf = "gemma3"
    sliding_every = 6
    largest = 62

    def kinds(self, fields: Fields, layers: int, theta: float, scaling: Scaling | None) -> tuple[AttentionKind, ...]:
        """As `Llama.kinds`."""
        head_dim, positions = fields.integer("head_dim", 256), fields.integer("max_position_embeddings", 131_072)
        parameters: Any = fields.table.get("rope_parameters")
        if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
            local = rope_of_layers(fields, "sliding_attention", positions, head_dim, _LOCAL)
        else:
            local = fields.number("rope_local_base_freq", _LOCAL), None
        return tuple(
            AttentionKind(None, True, theta, scaling) if window is None else AttentionKind(window, True, *local)
            for window in self.windows(fields, layers)
        )

    def rope(self, fields: Fields, positions: int, dims: int) -> tuple[float, Scaling | None]:
        """As `Llama.rope`, of the full layers."""
        return rope_of_layers(fields, "full_attention", positions, dims, _GLOBAL)

    def options(self, fields: Fields) -> dict[str, Any]:
        """As `Llama.options`."""
        scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
        return {**Gemma.options(self, fields), "attention_scale": scale}
