"""From named tensors to parameter pytrees, one block at a time.

Tensor names are those of Hugging Face checkpoints; every source maps its own names onto them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from qjax.errors import InputError, ModelFileError, listed
from qjax.models.config import ModelConfig

__all__ = ["DTYPES", "WeightSource", "check_source", "leaf_shapes", "read_block", "read_edges", "tensor_shapes"]

Params = Any  # a pytree of numpy arrays as documented in qjax.models.transformer

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_HEAD = "lm_head.weight"
_EDGES = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", _HEAD: "head"}
_SHOWN = 6  # how many problems one message lists


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors on disk, read one at a time.

    Attributes:
      names: Hugging Face names of all tensors.
      files: the files the tensors lie in (for hashing).
      description: how the weights are stored, e.g. "safetensors F32" or "dequantised Q4_1".
    """

    names: frozenset[str]
    files: tuple[Path, ...]
    description: str

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type, e.g. "BF16" or "Q4_1"."""
        ...

    def readable(self, name: str) -> bool:
        """Whether the stored type can be turned into floating values."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in host memory, of a floating dtype."""
        ...


def _block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for name, out, biased in (
        ("q_proj", queries, config.qkv_bias or config.attention_bias),
        ("k_proj", keys, config.qkv_bias or config.attention_bias),
        ("v_proj", keys, config.qkv_bias or config.attention_bias),
    ):
        shapes[f"self_attn.{name}.weight"] = (out, width)
        if biased:
            shapes[f"self_attn.{name}.bias"] = (out,)
    shapes["self_attn.o_proj.weight"] = (width, queries)
    if config.attention_bias:
        shapes["self_attn.o_proj.bias"] = (width,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    for name, out, inner in (("gate_proj", middle, width), ("up_proj", middle, width), ("down_proj", width, middle)):
        shapes[f"mlp.{name}.weight"] = (out, inner)
        if config.mlp_bias:
            shapes[f"mlp.{name}.bias"] = (out,)
    return shapes


def _edge_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_embeddings:
        shapes[_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has."""
    block = _block_shapes(config)
    return _edge_shapes(config) | {
        f"model.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in block.items()
    }


def _place(name: str) -> tuple[str, ...]:
    """Where a block's tensor lies in its parameters: norms are arrays, linears have a weight and perhaps a bias."""
    *parts, kind = name.split(".")
    norm = len(parts) == 1 or parts[-1] in ("q_norm", "k_norm")
    return tuple(parts) if norm else (*parts, kind)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path (`blocks/0/mlp/up_proj/weight`, `embed`) and shape of every leaf that a model's parameters have."""
    block = {"/".join(_place(name)): shape for name, shape in _block_shapes(config).items()}
    shapes = {_EDGES[name]: shape for name, shape in _edge_shapes(config).items()}
    return shapes | {f"blocks/{i}/{path}": shape for i in range(config.num_layers) for path, shape in block.items()}


def check_source(source: WeightSource, config: ModelConfig) -> None:
    """Compare names and shapes of all tensors with the configuration, before any data is read.

    Raises ModelFileError that lists tensors which are missing, of another shape, or would be left unused.
    """
    where = ", ".join(str(path) for path in source.files[:2])
    if config.num_layers > len(source.names):  # before a false number of layers costs memory
        raise ModelFileError(
            f"the configuration asks for {config.num_layers} layers, {where} has {len(source.names)} tensors in all"
        )
    expected = tensor_shapes(config)
    problems: list[str] = []
    for name, shape in expected.items():
        if name not in source.names:
            hint = " (or set tie_word_embeddings in config.json)" if name == _HEAD else ""
            problems.append(f"{name} of shape {list(shape)} is missing{hint}")
        elif source.shape(name) != shape:
            problems.append(f"{name} has shape {list(source.shape(name))}, the configuration asks for {list(shape)}")
        elif not source.readable(name):
            problems.append(f"{name} is stored as {source.dtype(name)}, which is not a readable weight type")
    unused = [n for n in source.names - expected.keys() if n != _HEAD and not n.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} is not a tensor of {config.architecture}" for name in sorted(unused)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ModelFileError(
            f"the weights in {where} do not fit their configuration: {'; '.join(problems[:_SHOWN])}{more}. "
            "Take config.json and the weights from the same revision of the model"
        )


def _read(source: WeightSource, name: str, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is reported below, with its place
        values = np.ascontiguousarray(source.read(name).astype(dtype, copy=False))
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), values.shape))
        bad = int(values.size - np.count_nonzero(finite))
        raise ModelFileError(
            f"tensor {name} has {bad} values that are not finite in {dtype.name}, the first one {values[index]} at "
            f"{list(index)}; the file is damaged or the model was saved wrongly"
            + (" (or its range needs dtype=float32)" if dtype != DTYPES["float32"] else "")
        )
    return values


def resolve_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of an allowed name. Raises InputError listing what is allowed."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not available for a model's weights; there is: {listed(DTYPES)}")
    return DTYPES[dtype]


def read_block(source: WeightSource, config: ModelConfig, index: int, dtype: str = "float32") -> Params:
    """The parameters of block `index` as numpy arrays, in the layout of `qjax.models.transformer`.

    Raises InputError for an index outside the model, ModelFileError for a value that is not finite.
    """
    if not 0 <= index < config.num_layers:
        raise InputError(f"block {index} does not exist: the model has blocks 0 to {config.num_layers - 1}")
    target = resolve_dtype(dtype)
    parameters: dict[str, Any] = {"self_attn": {}, "mlp": {}}
    for name in _block_shapes(config):
        values = _read(source, f"model.layers.{index}.{name}", target)
        *groups, last = _place(name)
        node = parameters
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = values
    return parameters


def read_edges(source: WeightSource, config: ModelConfig, dtype: str = "float32") -> Params:
    """What is outside the blocks: `{"embed": [vocab, width], "norm": [width], "head": [vocab, width] unless tied}`."""
    target = resolve_dtype(dtype)
    parameters = {
        "embed": _read(source, "model.embed_tokens.weight", target),
        "norm": _read(source, "model.norm.weight", target),
    }
    if not config.tie_embeddings:
        parameters["head"] = _read(source, _HEAD, target)
    return parameters
