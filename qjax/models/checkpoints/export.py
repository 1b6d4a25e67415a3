"""Write a dense model as a Hugging Face directory: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qjax.errors import ModelFileError, RunError
from qjax.models.checkpoints.hf_config import parse_config
from qjax.models.checkpoints.weights import tensor_leaves
from qjax.models.config import Linear, ModelConfig, RopeScaling
from qjax.models.families import family
from qjax.runtime.durable import WholeFolder

__all__ = ["described", "hugging_face_config", "hugging_face_tensors", "rounded", "write_directory"]


def hugging_face_config(config: ModelConfig, special_token: int) -> dict[str, Any]:
    """`config.json` of a Llama or Mixtral model; `special_token` both begins and ends a text.

    Raises ModelFileError for a family whose options these do not have.
    """
    types = {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral"}
    if config.architecture not in types or config.qkv_bias or config.qk_norm or config.rope_scaling:
        raise ModelFileError(
            f"only a plain LlamaForCausalLM or MixtralForCausalLM can be written, found {config.architecture} with "
            f"{config}"
        )
    experts = {"num_local_experts": "experts", "num_experts_per_tok": "active"}
    own = {key: getattr(config, name) for key, name in experts.items() if hasattr(config, name)}
    return {
        **_llama_keys(config, types[config.architecture]),
        "bos_token_id": special_token,
        "eos_token_id": special_token,
        "torch_dtype": "bfloat16",
        **own,
    }


def _llama_keys(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys that all families close to Llama have, without scaled frequencies."""
    return {
        "architectures": [config.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def described(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model whose family's options are Llama's, as readers of this and other projects take it.

    Raises ModelFileError for a configuration that this does not say: what is read back is another one.
    """
    table = {
        **_llama_keys(config, family(config).model_type),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }
    scaling = config.rope_scaling
    if isinstance(scaling, Linear):
        table["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, RopeScaling):
        table["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    try:
        understood = parse_config(table) == config
    except ModelFileError:
        understood = False
    if not understood:
        raise ModelFileError(
            f"the config.json of this {config.architecture} cannot be made from what qjax knows of it; give the "
            "original model's folder, whose files are copied: original=<folder>"
        )
    return table


def hugging_face_tensors(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters under the names of their family's checkpoints, in bfloat16."""
    found = {}
    for name, path in tensor_leaves(config).items():
        leaf = params
        for key in path.split("/"):
            leaf = leaf[int(key)] if isinstance(leaf, Sequence) else leaf[key]
        found[name] = np.asarray(leaf).astype(ml_dtypes.bfloat16)
    return found


def rounded(params: Any) -> Any:
    """Every parameter rounded to bfloat16 and back to float32: the values that a directory holds."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), params)


def write_directory(
    folder: Path,
    params: Any,
    config: ModelConfig,
    tokenizer_json: str,
    record: Mapping[str, Any],
    special_token: int,
    *,
    replace: bool = False,
) -> None:
    """Write the model and its training record as `folder`, which appears complete or not at all.

    Raises RunError when `folder` exists and `replace` is false, or when it cannot be written.
    """
    if folder.exists() and not replace:
        raise RunError(f"{folder} exists already and is not overwritten; remove it or choose another out")
    files = {
        "config.json": json.dumps(hugging_face_config(config, special_token), indent=2) + "\n",
        "tokenizer.json": tokenizer_json,
        "training.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        with WholeFolder(folder) as staging:
            for name, text in files.items():
                (staging / name).write_text(text, encoding="utf-8")
            save_file(hugging_face_tensors(params, config), staging / "model.safetensors", metadata={"format": "pt"})
            (staging / "model.safetensors").chmod(0o644)  # the writer makes it private
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror or error}); make room or choose another out"
        ) from error
