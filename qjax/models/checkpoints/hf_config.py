"""`config.json` of a Hugging Face model to `ModelConfig`: what is not supported is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig, RopeScaling

__all__ = ["ARCHITECTURES", "parse_config"]

# `model_type` of every supported architecture.
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SUPPORTED = "Llama 1/2/3 and SmolLM2 (LlamaForCausalLM), MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
_MISTRAL_WINDOW = 4096  # what the family means when the key is absent


class _Fields:
    """Typed access to a JSON object, with errors that name the file and the key."""

    def __init__(self, table: Mapping[str, Any], where: str):
        self.table, self.where = table, where

    def _value(self, key: str, default: Any) -> Any:
        value = self.table.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.where} has no {key}; take config.json and weights from the same revision")
            return default
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelFileError(f"{self.where}: {key} is {value!r}; an integer of at least 1 is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelFileError(f"{self.where}: {key} is {value!r}; a positive number is expected")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise ModelFileError(f"{self.where}: {key} is {value!r}; true or false is expected")
        return value


def _architecture(table: Mapping[str, Any], where: str) -> str:
    if table.get("quantization_config") is not None:
        quantization = table["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ModelFileError(
            f"{where} has a quantization_config (method {method!r}): the model is quantised already. "
            f"Take the original weights; supported are unquantised {SUPPORTED}"
        )
    named = table.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        architecture = str(named[0])
    else:
        by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
        architecture = by_type.get(str(table.get("model_type")), str(named or table.get("model_type")))
    if architecture not in ARCHITECTURES:
        raise ModelFileError(f"{where}: the architecture {architecture} is not supported; supported are {SUPPORTED}")
    return architecture


def _rope(table: Mapping[str, Any], where: str, positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of either layout: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`."""
    raw = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise ModelFileError(f"{where}: rope parameters that differ between layers are not supported, found {raw!r}")
    rope = _Fields(raw, f"{where}, rope parameters")
    theta = rope.number("rope_theta", _Fields(table, where).number("rope_theta", 10_000.0))
    if rope.number("partial_rotary_factor", _Fields(table, where).number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelFileError(f"{where}: a rotary embedding of a part of each head is not supported")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise ModelFileError(f"{where}: rope scaling of type {kind!r} is not supported; default and llama3 are")
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.integer("original_max_position_embeddings", positions),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelFileError(f"{where}: rope scaling needs high_freq_factor > low_freq_factor, found {scaling}")
    return theta, scaling


def _sliding_window(table: Mapping[str, Any], where: str, architecture: str, layers: int) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    fields = _Fields(table, where)
    if architecture == "MistralForCausalLM":
        absent = "sliding_window" not in table
        window = (
            None
            if not absent and table["sliding_window"] is None
            else fields.integer("sliding_window", _MISTRAL_WINDOW)
        )
    elif not fields.flag("use_sliding_window") or table.get("sliding_window") is None:
        return None
    else:
        window = fields.integer("sliding_window")
    kinds = table.get("layer_types")
    if kinds is None:
        full = table.get("max_window_layers", layers) if architecture != "MistralForCausalLM" else 0
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise ModelFileError(f"{where}: layers with and without a sliding window in one model are not supported")
    return window


def parse_config(table: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model's static description from the contents of `config.json`.

    Raises ModelFileError for an unknown architecture, an already quantised model, an option that the forward pass does
    not have (activation, rope type, partial rotation, mixed windows), or numbers that contradict each other.
    """
    architecture = _architecture(table, where)
    fields = _Fields(table, where)
    if (activation := table.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelFileError(f"{where}: hidden_act {activation!r} is not supported; supported is silu")
    heads, layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    width = fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads", heads if architecture == "LlamaForCausalLM" else None)
    if heads % kv_heads:
        raise ModelFileError(f"{where}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    head_dim = fields.integer("head_dim", 128 if architecture == "Qwen3ForCausalLM" else max(width // heads, 1))
    if head_dim % 2 or (table.get("head_dim") is None and architecture != "Qwen3ForCausalLM" and width % heads):
        raise ModelFileError(
            f"{where}: head_dim must be an even integer, found {width}/{heads} = {width / heads:g} "
            f"with head_dim {table.get('head_dim')!r}"
        )
    positions = fields.integer("max_position_embeddings", 2048)
    theta, scaling = _rope(table, where, positions)
    biases = fields.flag("attention_bias") and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=positions,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=biases or architecture == "Qwen2ForCausalLM",
        attention_bias=biases,
        mlp_bias=fields.flag("mlp_bias") and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(table, where, architecture, layers),
    )
