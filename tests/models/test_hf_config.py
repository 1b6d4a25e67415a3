"""`config.json` to `ModelConfig`: both layouts of rotary parameters, family defaults, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest

from qjax.errors import ModelFileError
from qjax.models.checkpoints.hf_config import parse_config
from qjax.models.config import RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SCALED = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def parse(**changes: Any):
    return parse_config({key: value for key, value in (LLAMA | changes).items() if value is not ...})


def test_plain_llama():
    config = parse()
    assert (config.head_dim, config.rope_theta, config.rope_scaling, config.sliding_window) == (8, 10_000.0, None, None)
    assert not (config.qkv_bias or config.attention_bias or config.mlp_bias or config.qk_norm or config.tie_embeddings)
    assert parse(num_key_value_heads=...).num_kv_heads == 4  # Llama 1 has no such key


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALED | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": SCALED | {"type": "llama3"}},
        {"rope_parameters": SCALED | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_llama3_scaling_in_every_layout(changes: dict[str, Any]):
    config = parse(**changes)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}, {"type": None}])
def test_no_scaling(rope: Any):
    assert parse(rope_scaling=rope).rope_scaling is None


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_other_scalings_are_refused_by_name(kind: str):
    with pytest.raises(ModelFileError, match=f"'{kind}'.*llama3"):
        parse(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_biases_by_family():
    llama = parse(attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias and llama.attention_bias and llama.mlp_bias
    qwen2 = parse(architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias and not qwen2.attention_bias
    qwen3 = parse(architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128


def test_sliding_windows_by_family():
    assert parse(sliding_window=64).sliding_window is None
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral).sliding_window == 4096
    assert parse(**mistral, sliding_window=64).sliding_window == 64
    assert parse(**mistral, sliding_window=None).sliding_window is None
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert parse(**qwen, use_sliding_window=False).sliding_window is None
    assert parse(**qwen, use_sliding_window=True, max_window_layers=2).sliding_window is None
    assert parse(**qwen, use_sliding_window=True, max_window_layers=0).sliding_window == 64
    with pytest.raises(ModelFileError, match="with and without a sliding window"):
        parse(**qwen, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ModelFileError, match="with and without a sliding window"):
        parse(**qwen, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])


def test_family_from_the_model_type_alone():
    assert parse(architectures=..., model_type="qwen3").architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("named", [["GPT2LMHeadModel"], ["GemmaForCausalLM"], ["DeepseekV3ForCausalLM"], "text", []])
def test_unknown_architecture_lists_what_is_supported(named: Any):
    with pytest.raises(ModelFileError, match="not supported.*Llama.*Mistral.*Qwen2.*Qwen3"):
        parse(architectures=named, model_type="other")


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, {}, "fp8"])
def test_quantised_model_is_refused(value: Any):
    with pytest.raises(ModelFileError, match="quantised already.*supported are"):
        parse(quantization_config=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_size": 30}, "head_dim must be an even integer"),
        ({"head_dim": 7}, "head_dim must be an even integer"),
        ({"hidden_size": ...}, "no hidden_size"),
        ({"vocab_size": "100"}, "vocab_size is '100'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_scaling": SCALED | {"rope_type": "llama3", "factor": None}}, "no factor"),
        ({"rope_scaling": SCALED | {"rope_type": "llama3", "high_freq_factor": 1.0}}, "high_freq_factor >"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ModelFileError, match=message):
        parse(**changes)
