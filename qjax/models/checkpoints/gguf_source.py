"""A GGUF file as a `WeightSource`: Hugging Face names, dequantised values, rows in half-split rotary order."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize

from qjax.errors import ModelFileError, listed
from qjax.models.checkpoints.gguf_format import GgufHeader, GgufTensor
from qjax.models.checkpoints.weights import tensor_shapes
from qjax.models.config import Linear, ModelConfig, RopeScaling, Scaling
from qjax.models.families import FAMILIES, Fields, family
from qjax.models.families.rope import rope
from qjax.models.rope import rope_frequencies

__all__ = ["GgufSource", "gguf_config"]

_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and 3.2 files store the divisors of the frequencies, not the rule; these are the two published rules.
_LLAMA3_RULES = (RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192))
# Entries that change what is computed lie below these prefixes; read are those that a configuration asks for, those of
# the rotary scaling, and harmless ones.
_PREFIXES = ("rope.", "attention.")
_HARMLESS = {"rope.scaling.finetuned", "attention.layer_norm_epsilon"}
_SCALING = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")
_UNQUANTISED = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}


def _gguf_names(config: ModelConfig) -> dict[str, str]:
    """The Hugging Face name of every tensor of the model, by its name in GGUF files."""
    architecture = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == family(config).gguf)
    known = get_tensor_name_map(architecture, config.num_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensor_shapes(config)}
    return {name: own for own, name in found.items() if name is not None}


class GgufSource:
    """Tensors of a GGUF file, dequantised to float32 one at a time.

    Llama files store q and k rows so that rotary pairs are neighbours (row 2i with 2i + 1 of a head); they are put back
    to the half-split order (i with i + dim/2). Qwen files keep the half-split order.
    """

    def __init__(self, files: tuple[Path, ...], header: GgufHeader, config: ModelConfig):
        names = _gguf_names(config)
        self._tensors = {names.get(n, n): t for n, t in header.tensors.items() if n != _ROPE_FACTORS}
        self._added = np.float32(family(config).gguf_gain)
        self._paired, self._head_dim = family(config).gguf_paired, config.head_dim
        self.names = frozenset(self._tensors)
        self.files = files
        counts = collections.Counter(t.type for n, t in self._tensors.items() if ".layers." in n and len(t.shape) == 2)
        types = [kind.name for kind, _ in counts.most_common()]
        self.quantised = not set(counts) <= _UNQUANTISED
        prefix = "dequantised" if self.quantised else "GGUF"
        self.description = f"{prefix} {'/'.join(types)}"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, slowest dimension first."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The stored type, e.g. "Q4_1"."""
        return self._tensors[name].type.name

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in the file."""
        return self._tensors[name].size

    def readable(self, name: str) -> bool:
        """Whether the type is floating or one that the package `gguf` dequantises."""
        return _decodable(self._tensors[name].type)

    def read(self, name: str) -> np.ndarray:
        """The dequantised tensor in float32, rows in half-split order. Raises ModelFileError when it was cut short."""
        tensor = self._tensors[name]
        values = _dequantised(name, tensor)
        if len(tensor.shape) == 1 and name.endswith("norm.weight"):
            values = values - self._added
        if not name.rpartition(".")[0].endswith(self._paired):
            return values
        pairs = values.reshape(-1, self._head_dim // 2, 2, math.prod(tensor.shape[1:]))
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


@functools.cache
def _decodable(kind: GGMLQuantizationType) -> bool:
    if kind.name.startswith("I") and kind.name[1:].isdigit():  # plain integers; the IQ types are weights
        return False
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantised(name: str, tensor: GgufTensor) -> np.ndarray:
    path = tensor.path
    try:
        raw = np.fromfile(path, np.uint8, tensor.size, offset=tensor.start)
    except OSError as error:
        raise ModelFileError(f"cannot read tensor {name} from {path}: {error}") from error
    if raw.size != tensor.size:
        raise ModelFileError(f"{path} ended inside tensor {name}: {raw.size} of {tensor.size} bytes were there")
    return (
        dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.type)
        .astype(np.float32, copy=False)
        .reshape(tensor.shape)
    )


def _rope_scaling(path: Path, header: GgufHeader, theta: float, head_dim: int) -> Scaling | None:
    """As llama.cpp reads it: a factor without a type is linear, the factor 0 or 1 is none."""
    prefix = f"{header.metadata['general.architecture']}."
    value = lambda key, default=None: header.metadata.get(prefix + key, default)  # noqa: E731
    kind = value("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelFileError(f"{path}: rope scaling of type {kind!r} is not supported in a GGUF file")
    factor = value("rope.scaling.factor", value("rope.scale_linear", 0.0))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise ModelFileError(
            f"{path}: the factor of {prefix}rope.scaling is {factor!r}; a number of at least 0 is expected"
        )
    if kind != "none" and factor not in (0, 1):
        table = {
            "rope_type": kind,
            "factor": float(factor),
            "original_max_position_embeddings": value("rope.scaling.original_context_length"),
            "beta_fast": value("rope.scaling.yarn_beta_fast"),
            "beta_slow": value("rope.scaling.yarn_beta_slow"),
        }
        if value("rope.scaling.yarn_log_multiplier", 0.0):
            raise ModelFileError(f"{path}: {prefix}rope.scaling.yarn_log_multiplier is not supported")
        fields = Fields({"rope_scaling": table, "rope_theta": theta}, str(path))
        return rope(fields, Fields(header.metadata, str(path)).integer(f"{prefix}context_length"), head_dim)[1]
    tensor = header.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    divisors = _dequantised(_ROPE_FACTORS, tensor)
    plain = rope_frequencies(head_dim, theta, None)
    for rule in _LLAMA3_RULES:
        expected = plain / rope_frequencies(head_dim, theta, rule)
        if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4):
            return rule
    raise ModelFileError(
        f"{path}: its {_ROPE_FACTORS} follows none of the known Llama 3 rules; load the Hugging Face folder instead"
    )


def gguf_config(path: Path, header: GgufHeader) -> ModelConfig:
    """The model's static description from a GGUF file's metadata.

    Raises ModelFileError for an unknown architecture, experts, partial rotation or a missing entry.
    """
    metadata = header.metadata
    kind = metadata.get("general.architecture")
    architectures = {known().gguf: name for name, known in FAMILIES.items() if known().gguf is not None}
    if kind not in architectures:
        raise ModelFileError(
            f"{path}: the GGUF architecture {kind!r} is not supported; there is: {listed(architectures)}"
        )

    own: Any = FAMILIES.make(architectures[kind])  # those with GGUF files are derived from Llama

    read = {"rope.scale_linear", *(f"rope.scaling.{name}" for name in _SCALING), *_HARMLESS}

    def entry(key: str, default: Any = None) -> Any:
        read.add(key)
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ModelFileError(f"{path} has no metadata entry {kind}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ModelFileError(f"{path}: the metadata entry {kind}.{key} is {value!r}; one number is expected")
        return value

    if entry("expert_count", 0):
        raise ModelFileError(f"{path}: a mixture of experts is not supported")
    width, heads = int(entry("embedding_length")), max(int(entry("attention.head_count")), 1)
    head_dim = int(entry("attention.key_length", width // heads))
    kv_heads = max(int(entry("attention.head_count_kv", heads)), 1)
    if entry("rope.dimension_count", head_dim) != head_dim or entry("attention.value_length", head_dim) != head_dim:
        raise ModelFileError(f"{path}: heads rotated in part or with values of another width are not supported")
    if heads % kv_heads or head_dim % 2:
        raise ModelFileError(f"{path}: {heads} heads, {kv_heads} key/value heads, width {head_dim} do not fit together")
    theta = float(entry("rope.freq_base", 10_000.0))
    if theta <= 0:
        raise ModelFileError(f"{path}: the rotary base {kind}.rope.freq_base is {theta}; a positive number is expected")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{path} has no tensor token_embd.weight")
    scaling = _rope_scaling(path, header, theta, head_dim)
    table = own.gguf_table(entry)
    if table is not None:
        common = {
            "vocab_size": embedding.shape[0],
            "hidden_size": width,
            "intermediate_size": int(entry("feed_forward_length")),
            "num_hidden_layers": int(entry("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rope_theta": theta,
            "rms_norm_eps": float(entry("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": int(entry("context_length")),
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "attention_bias": "blk.0.attn_output.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        }
        if isinstance(scaling, Linear):
            common["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        elif scaling is not None:
            raise ModelFileError(f"{path}: rope scaling other than linear is not supported for {kind!r}: {scaling}")
        if (pattern := metadata.get(f"{kind}.attention.sliding_window_pattern")) is not None:
            read.add("attention.sliding_window_pattern")
            common |= _windows(path, pattern)
        config = own.config(Fields(common | table, str(path)), architectures[kind])
        _refuse_unread(path, metadata, str(kind), read)
        return config
    config = ModelConfig(
        architecture=architectures[kind],
        vocab_size=embedding.shape[0],
        hidden_size=width,
        intermediate_size=int(entry("feed_forward_length")),
        num_layers=int(entry("block_count")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(entry("attention.layer_norm_rms_epsilon")),
        max_positions=int(entry("context_length")),
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        attention_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        qk_norm=own.qk_norm,
        sliding_window=int(entry("attention.sliding_window", 0)) or None,
    )
    _refuse_unread(path, metadata, str(kind), read)
    return config


def _windows(path: Path, pattern: Any) -> dict[str, Any]:
    """The layers with a window, as `config.json` says it: every which layer has none, or by layer."""
    if isinstance(pattern, list | np.ndarray):
        return {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in pattern]}
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise ModelFileError(f"{path}: attention.sliding_window_pattern is {pattern!r}; a number or a list is expected")
    return {"sliding_window_pattern": pattern}


def _refuse_unread(path: Path, metadata: Mapping[str, Any], kind: str, read: set[str]) -> None:
    """Raises ModelFileError for an entry that may change what is computed and that nobody asked for."""
    for key, value in metadata.items():
        name = key.removeprefix(f"{kind}.")
        harmless = name in read or (name == "attention.causal" and value is True)
        if name != key and name.startswith(_PREFIXES) and not harmless:
            raise ModelFileError(
                f"{path}: the metadata entry {key} is {value!r}, which may change what is computed and is not read; "
                "take the original model's Hugging Face folder"
            )
