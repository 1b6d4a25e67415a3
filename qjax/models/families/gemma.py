"""Gemma 1: Llama with gains of 1 + w, a GELU gate and an embedding times the root of its width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.families.base import FAMILIES, Residual
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.models.norms import rms_norm
from qjax.typing import HostOrDevice

__all__ = ["Gemma"]


@FAMILIES.register("GemmaForCausalLM")
class Gemma(Llama):
    """Llama with Gemma's norms, gate and embedding, which is the head unless the configuration says otherwise."""

    model_type = "gemma"
    title = "GemmaForCausalLM"
    gguf = "gemma"
    gguf_paired = ()
    gguf_gain = 1.0
    mlp_bias = False
    head_dim = 256

    def check_activation(self, fields: Fields) -> None:
        """`hidden_activation`, or `hidden_act` of older files (whose "gelu" is meant as its approximation, too)."""
        allowed = ("gelu_pytorch_tanh", "gelu")
        fields.choice("hidden_activation", allowed[:1], "gelu_pytorch_tanh")
        fields.choice("hidden_act", allowed, "gelu_pytorch_tanh")

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """The activation, which files do not name."""
        return {"hidden_activation": "gelu_pytorch_tanh"}

    def options(self, fields: Fields) -> dict[str, Any]:
        """As `Llama.options`."""
        return {"tie_embeddings": fields.flag("tie_word_embeddings", True)}

    def activation(self, x: Array) -> Array:
        """As `Llama.activation`."""
        return jax.nn.gelu(x, approximate=True)

    def norm(self, x: HostOrDevice, gain: HostOrDevice, config: ModelConfig) -> Array:
        """`(1 + gain) · x / √(mean x² + eps)`."""
        return rms_norm(x, 1 + gain.astype(jnp.float32), config.rms_norm_eps)

    def embed(self, parameters: Any, tokens: Array, positions: Array, config: ModelConfig) -> Array:
        """Rows of the embedding matrix times `√width`, which is rounded to their dtype first."""
        x = super().embed(parameters, tokens, positions, config)
        return x * jnp.asarray(config.hidden_size**0.5, x.dtype)

    def residual(self) -> Residual | None:
        """As `Family.residual`: gains are 1 + w, which folding does not write."""
        return None
