"""The static description of a decoder-only transformer."""

from __future__ import annotations

import dataclasses

__all__ = ["ModelConfig", "RopeScaling"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's piecewise stretching of the rotary frequencies (wavelengths in positions)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a Llama-like model; hashable, so it is a static argument of compiled programs.

    Attributes:
      architecture: family name as in `config.json`, e.g. "LlamaForCausalLM" (for messages and export).
      head_dim: width of one attention head; `num_heads * head_dim` may differ from `hidden_size`.
      qkv_bias: biases on q, k and v (Qwen2).
      attention_bias: also on o.
      mlp_bias: on gate, up, down.
      qk_norm: RMS norm of every q and k head before the rotation (Qwen3).
      sliding_window: attend to this many latest positions only, or None.
      tie_embeddings: the head is the embedding matrix.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
