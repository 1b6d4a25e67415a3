"""From named tensors to parameter pytrees, one block at a time.

Tensor names are those of Hugging Face checkpoints; every source maps its own names onto them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from qjax.errors import InputError, ModelFileError, listed
from qjax.models.config import ModelConfig
from qjax.models.families import KIND, family, paths

__all__ = [
    "DTYPES",
    "WeightSource",
    "check_source",
    "head_is_embedding",
    "leaf_shapes",
    "read_block",
    "read_edges",
    "resolve_dtype",
    "stored_bits",
    "stored_bytes",
    "tensor_leaves",
    "tensor_shapes",
    "with_kind",
]

Params = Any  # a pytree of numpy arrays as documented in qjax.models.transformer

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_HEAD = "lm_head.weight"
_REVISION = "Take config.json and the weights from the same revision of the model"
_TYPES = "Take weights in F64, F32, F16 or BF16; 8-bit floats need their scales and a quantization_config"
_SHOWN = 6  # how many problems one message lists


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors on disk, read one at a time.

    Attributes:
      names: Hugging Face names of all tensors.
      files: the files the tensors lie in (for hashing).
      quantised: whether matrices are stored in codes and come as the values that these stand for.
      description: how the weights are stored, e.g. "safetensors F32" or "dequantised Q4_1".
    """

    names: frozenset[str]
    files: tuple[Path, ...]
    description: str
    quantised: bool

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type, e.g. "BF16" or "Q4_1"."""
        ...

    def nbytes(self, name: str) -> int:
        """The bytes that the tensor takes in its file."""
        ...

    def readable(self, name: str) -> bool:
        """Whether the stored type can be turned into floating values."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in host memory, of a floating dtype."""
        ...


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has."""
    own = family(config)
    edges = {name: shape for name, (_, shape) in own.edge_tensors(config).items()}
    block = own.block_tensors(config)
    prefixes = [own.prefix.format(index=index) for index in range(config.num_layers)]
    return edges | {prefix + name: shape for prefix in prefixes for name, shape in block.items()}


def stored_bytes(source: WeightSource, config: ModelConfig) -> int:
    """The bytes of a model's tensors as its files hold them."""
    return sum(source.nbytes(name) for name in tensor_shapes(config))


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path (`blocks/0/mlp/up_proj/weight`, `embed`) and shape of every leaf that a model's parameters have."""
    own = family(config)
    tensors = own.block_tensors(config)
    block = {"/".join(path): tensors[name] for name, path in paths(tensors).items()}
    shapes = dict(own.edge_tensors(config).values())
    return shapes | {f"blocks/{i}/{path}": shape for i in range(config.num_layers) for path, shape in block.items()}


def tensor_leaves(config: ModelConfig) -> dict[str, str]:
    """The path of the leaf that every tensor becomes, by its name."""
    own = family(config)
    edges = {name: path for name, (path, _) in own.edge_tensors(config).items()}
    places = paths(own.block_tensors(config))
    return edges | {
        f"{own.prefix.format(index=i)}{name}": f"blocks/{i}/{'/'.join(path)}"
        for i in range(config.num_layers)
        for name, path in places.items()
    }


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
    unreadable = 0
    for name, shape in expected.items():
        if name not in source.names:
            hint = " (or set tie_word_embeddings in config.json)" if name == _HEAD else ""
            problems.append(f"{name} of shape {list(shape)} is missing{hint}")
        elif source.shape(name) != shape:
            problems.append(f"{name} has shape {list(source.shape(name))}, the configuration asks for {list(shape)}")
        elif not source.readable(name):
            problems.append(f"{name} is stored as {source.dtype(name)}, which is not a readable weight type")
            unreadable += 1
    ignored = family(config).ignored
    unused = [n for n in source.names - expected.keys() if n != _HEAD and not n.endswith(ignored)]
    problems += [f"{name} is not a tensor of {config.architecture}" for name in sorted(unused)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ModelFileError(
            f"the weights in {where} do not fit their configuration: {'; '.join(problems[:_SHOWN])}{more}. "
            + (_TYPES if unreadable == len(problems) else _REVISION)
        )


def head_is_embedding(source: WeightSource, config: ModelConfig) -> bool:
    """Whether a model that ties them stores no head, or the embedding once more as its head."""
    edges = {path: name for name, (path, _) in family(config).edge_tensors(config).items()}
    embedding = edges.get("embed", edges.get("embed/tokens"))
    if _HEAD not in source.names or embedding is None:
        return True
    if source.shape(_HEAD) != source.shape(embedding):
        return False
    return np.array_equal(source.read(_HEAD), source.read(embedding))


def stored_bits(source: WeightSource, config: ModelConfig) -> float:
    """Bits per weight of the blocks' matrices as the files hold them, scales and zeros included."""
    own = family(config)
    matrices = [name for name, shape in own.block_tensors(config).items() if len(shape) == 2]
    names = [own.prefix.format(index=index) + name for index in range(config.num_layers) for name in matrices]
    return 8 * sum(map(source.nbytes, names)) / sum(math.prod(source.shape(name)) for name in names)


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
    target, own = resolve_dtype(dtype), family(config)
    parameters: dict[str, Any] = {}
    for name, path in paths(own.block_tensors(config)).items():
        _put(parameters, path, _read(source, own.prefix.format(index=index) + name, target))
    return with_kind(parameters, config, index)


def with_kind(parameters: Params, config: ModelConfig, index: int) -> Params:
    """A block's parameters with the kind of its attention, where layers differ."""
    kind = config.kind(index)
    return parameters if kind is None else {**parameters, KIND: kind}


def read_edges(source: WeightSource, config: ModelConfig, dtype: str = "float32") -> Params:
    """The parameters outside the blocks: `{"embed", "norm", "head" unless tied}`, arrays or dictionaries of them."""
    target = resolve_dtype(dtype)
    parameters: dict[str, Any] = {}
    for name, (path, _) in family(config).edge_tensors(config).items():
        _put(parameters, path.split("/"), _read(source, name, target))
    return {"norm": {}, **parameters}  # a family may have nothing behind its blocks


def _put(tree: dict[str, Any], path: Sequence[str], value: np.ndarray) -> None:
    *groups, last = path
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = value
