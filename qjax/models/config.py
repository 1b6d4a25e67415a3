"""The static description of a decoder-only transformer."""

from __future__ import annotations

import dataclasses

import jax

__all__ = ["AttentionKind", "Dynamic", "Linear", "LongRope", "ModelConfig", "RopeScaling", "Scaling", "Yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's piecewise stretching of the rotary frequencies (wavelengths in positions)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`: all frequencies are (Chen et al., 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A base that grows with the sequence, once it is longer than the original positions (NTK-aware scaling)."""

    factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (2309.00071): fast rotations stay, slow ones are divided by `factor`, those between are blended.

    Attributes:
      factor: of the slow ones.
      beta_fast: turns within the original positions from which on a frequency stays.
      beta_slow: turns up to which it is divided whole.
      original_max_positions: of the training.
      attention: multiplies cos and sin, of queries and of keys.
      truncate: ends of the blend are whole indices.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_positions: int
    attention: float
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (2402.13753): a divisor of every frequency, others for sequences beyond the original positions.

    Attributes:
      short, long: the divisors up to and beyond `original_max_positions`.
      original_max_positions: of the training.
      attention: multiplies cos and sin.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention: float


Scaling = RopeScaling | Linear | Dynamic | Yarn | LongRope


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What layers of one model may differ in: a leafless part of a block's parameters, so it selects the program.

    Attributes:
      window: latest positions that are attended to, None all.
      rotary: whether queries and keys are turned by their positions.
      rope_theta: base of the rotation.
      rope_scaling: its scaling.
    """

    window: int | None = None
    rotary: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class ModelConfig:
    """Shapes and constants of a decoder; hashable, so it is a static argument of compiled programs.

    Attributes:
      architecture: family name as in `config.json`, e.g. "LlamaForCausalLM" (for messages and export).
      head_dim: width of one attention head; `num_heads * head_dim` may differ from `hidden_size`.
      qkv_bias: biases on q, k and v (Qwen2).
      attention_bias: also on o.
      mlp_bias: on gate, up, down.
      qk_norm: RMS norm of every q and k head before the rotation (Qwen3).
      sliding_window: attend to this many latest positions only, or None.
      tie_embeddings: the head is the embedding matrix.
      rotary_dim: leading values of a head that are rotated, None all.
      attention_kinds: of every layer, None where all are as the options above say.
      attention_scale: factor of the scores, None is `head_dim^(-1/2)`.
      attention_cap: scores s become `cap · tanh(s / cap)`, None leaves them.
      logits_cap: likewise of logits.
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
    rope_scaling: Scaling | None = None
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    rotary_dim: int | None = None
    attention_kinds: tuple[AttentionKind, ...] | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None

    def __repr__(self) -> str:
        """As a dataclass prints itself, without later options that are not used: it is part of fingerprints."""
        fields = [f for f in dataclasses.fields(self) if f.name not in _LATER or getattr(self, f.name) is not None]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def kind(self, layer: int) -> AttentionKind | None:
        """The attention of a layer where layers differ."""
        return None if self.attention_kinds is None else self.attention_kinds[layer]


_LATER = {"rotary_dim", "attention_kinds", "attention_scale", "attention_cap", "logits_cap"}
