"""Granite 3: Llama with a multiplier of the embedding, of the scores, of every branch, and a divisor of the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.typing import HostOrDevice

__all__ = ["Granite", "GraniteConfig"]


@dataclasses.dataclass(frozen=True, repr=False)
class GraniteConfig(ModelConfig):
    """The configuration of a Granite; `attention_scale` is its `attention_multiplier`.

    Attributes:
      embedding_multiplier: of the embedding.
      residual_multiplier: of the outputs of attention and MLP.
      logits_scaling: divisor of the logits.
    """

    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


@FAMILIES.register("GraniteForCausalLM")
class Granite(Llama):
    """Llama with multipliers."""

    model_type = "granite"
    title = "GraniteForCausalLM"
    gguf = "granite"
    Config = GraniteConfig

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """The multipliers."""
        return {
            "attention_multiplier": entry("attention.scale"),
            "embedding_multiplier": entry("embedding_scale"),
            "residual_multiplier": entry("residual_scale"),
            "logits_scaling": entry("logit_scale"),
        }

    def options(self, fields: Fields) -> dict[str, Any]:
        """As `Llama.options`."""
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        found = {name: fields.number(name, 1.0) for name in names}
        return {**found, "attention_scale": fields.number("attention_multiplier", 1.0)}

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: Any) -> Array:
        """Rows of the embedding matrix times the multiplier."""
        return super().embed(parameters, tokens, positions, config) * config.embedding_multiplier

    def added(self, x: HostOrDevice, branch: Array, config: Any) -> Array:
        """As `Llama.added`."""
        return branch * config.residual_multiplier + x

    def final(self, parameters: Any, x: HostOrDevice, config: Any) -> Array:
        """The final norm over the divisor of the logits."""
        return super().final(parameters, x, config) / config.logits_scaling
