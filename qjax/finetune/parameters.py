"""A quantised model as trainable and frozen arrays, and back.

Parameters that can be tuned are named by their place, without the word `weight` of a quantised one:
`layers.3.self_attn.q_proj.input_gain`, `.output_gain`, `.scaling.relative`, `layers.3.input_layernorm`, `norm`,
`embed`, `head`, `table.0` (a codebook table that all matrices share), and `layers.3.mlp.up_proj.weight` where a layer
is dense.

Equal layers in a row are stacked, so that one scanned body serves them all: a program's size does not grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.finetune.edges import edge_leaves, tree
from qjax.matrix.quantized import QuantizedMatrix
from qjax.models import transformer
from qjax.models.config import ModelConfig
from qjax.models.linear import linears_of, replace_linears
from qjax.typing import Leaf, pytree

__all__ = [
    "Gained",
    "Layout",
    "Segment",
    "Trainable",
    "dense_folded",
    "gained",
    "hidden",
    "layer_value",
    "merged",
    "tunable",
    "view",
]

_TUNABLE = re.compile(r"(norm|bias|_gain|scaling\.relative|\.weight|\.lora_[ab]|\.latent|^embed|^head|^table\.\d+)$")
_TABLE = ".codebook.table"
Named = dict[str, Any]


@pytree
class Gained:
    """`diag(a) B diag(b)` with a dense B `[out, in]` that stays as it is: no gradient of its size exists."""

    base: Leaf
    output_gain: Leaf
    input_gain: Leaf

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`((x ⊙ b) Bᵀ) ⊙ a` in the dtype of x."""
        row = (1,) * (x.ndim - 1) + (-1,)
        y = jnp.einsum("...i,oi->...o", x * self.input_gain.astype(x.dtype).reshape(row), self.base.astype(x.dtype))
        return y * self.output_gain.astype(x.dtype).reshape(row)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers `start … stop − 1`, which have the same structure; `shared` maps leaf names to entries without layers."""

    start: int
    stop: int
    names: tuple[str, ...]
    structure: Any
    shared: tuple[tuple[str, str], ...]

    def key(self, name: str) -> str:
        """The name of the stacked array of a leaf."""
        return f"layers.{self.start}-{self.stop - 1}.{name}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static part of a view; hashable."""

    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A model as arrays by name.

    Attributes:
      tuned: float32 arrays that move.
      frozen: all other arrays.
      rates: the peak learning rate of every entry of `tuned`, `[layers, 1, …]` for stacked ones (0 for a frozen layer).
      layout: how the arrays make a model.
    """

    tuned: dict[str, Any]
    frozen: dict[str, Any]
    rates: dict[str, np.ndarray]
    layout: Layout


def _leaves(block: Any) -> tuple[Named, Any]:
    """Leaves of a block by name, and its structure. A matrix that is no array takes the place of its `weight`."""
    flat, structure = jax.tree_util.tree_flatten_with_path(block)
    named = {}
    for path, leaf in flat:
        keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "weight" in keys[:-1]:
            keys.remove("weight")
        named[".".join(keys)] = leaf
    return named, structure


def _replaced(block: Any, change: Any) -> Any:
    """The block with `change(name, matrix)` in place of every quantised matrix."""
    matrices = {name: weight for name, weight in linears_of(block).items() if isinstance(weight, QuantizedMatrix)}
    return replace_linears(block, {name: change(name, matrix) for name, matrix in matrices.items()})


def gained(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix with float32 gains, ones where it has none, and float32 relative scales, ready to be tuned."""
    out, inner = matrix.shape

    def gain(value: Any, size: int) -> np.ndarray:
        return np.ones(size, np.float32) if value is None else np.asarray(value, np.float32)

    scaling: Any = matrix.scaling
    if scaling.relative is not None:
        scaling = scaling.replace(relative=np.asarray(scaling.relative, np.float32))
    whole: Any = matrix
    return whole.replace(
        scaling=scaling, output_gain=gain(matrix.output_gain, out), input_gain=gain(matrix.input_gain, inner)
    )


def _with_gains(block: Any) -> Any:
    return _replaced(block, lambda name, matrix: gained(matrix))


def _book(codebook: Any) -> str:
    return json.dumps(codebook.spec(), sort_keys=True)


def _tables(params: Any) -> dict[str, Any]:
    """The float table of every codebook that has one, by the codebook's description."""
    found: dict[str, Any] = {}

    def look(name: str, matrix: QuantizedMatrix) -> QuantizedMatrix:
        codebook: Any = matrix.codebook
        table = getattr(codebook, "table", None)
        if table is not None and jnp.issubdtype(table.dtype, jnp.floating):
            found.setdefault(_book(codebook), table)
        return matrix

    for block in params["blocks"]:
        _replaced(block, look)
    return found


def tunable(params: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that can be tuned (quantised matrices have gains, existing or not)."""
    names: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(params["blocks"]):
        for name, leaf in _leaves(_with_gains(block))[0].items():
            if _TUNABLE.search(name):
                names[f"layers.{index}.{name}"] = tuple(leaf.shape)
    names |= {name: tuple(leaf.shape) for name, leaf in edge_leaves(params).items()}
    names |= {f"table.{i}": tuple(np.shape(table)) for i, table in enumerate(_tables(params).values())}
    return names


@jax.jit
def _dense(matrix: QuantizedMatrix) -> Array:
    return matrix.dequantize()


def _folded(block: Any, rates: Mapping[str, float], prefix: str, tables: Mapping[str, str]) -> Any:
    """Decode once every matrix whose codes, scales and table all stay as they are."""

    def fold(name: str, matrix: Any) -> Any:
        live = rates.get(f"{prefix}.{name}.scaling.relative", 0) > 0
        live |= rates.get(tables.get(_book(matrix.codebook), ""), 0) > 0
        if live:
            return matrix
        base = _dense(matrix.replace(output_gain=None, input_gain=None))
        return Gained(base, matrix.output_gain, matrix.input_gain)

    return _replaced(block, fold)


def dense_folded(block: Any) -> Any:
    """One block ready to be tuned alone: every quantised matrix decoded once, between gains."""
    return _folded(_with_gains(block), {}, "", {})


def named_leaves(block: Any) -> tuple[Named, Any, list[str]]:
    """Leaves of a block by name, its structure, and the names of those that can be tuned."""
    leaves, structure = _leaves(block)
    return leaves, structure, [name for name in leaves if _TUNABLE.search(name)]


def stored_block(block: Any, host: Mapping[str, np.ndarray], dtype: Any = np.float16) -> Any:
    """A block with tuned values; gains of quantised matrices in their storage type."""

    def change(name: str, matrix: Any) -> Any:
        gains = {part: host.get(f"{name}.{part}") for part in ("output_gain", "input_gain")}
        return matrix.replace(**{part: _stored(value, dtype) for part, value in gains.items() if value is not None})

    return _dense_leaves_replaced(_replaced(block, change), host.get)


def view(
    params: Any,
    rates: Mapping[str, float],
    place: Callable[[str, Any], Any] = lambda name, array: jax.device_put(array),
) -> Trainable:
    """The trainable view of a model; `rates`, as of `assign(rules, tunable(params))`, are above 0 for what moves.

    Only what depends on a moving parameter is decoded in every step: with gains, norms and edges alone every matrix is
    decoded once here. `place(name, array)` puts an array where it is tuned.
    """
    tables = _tables(params)
    keys = {book: f"table.{i}" for i, book in enumerate(tables)}
    tuned: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    scale: dict[str, np.ndarray] = {}

    def put(key: str, value: Any, rate: np.ndarray) -> None:
        if rate.any():
            tuned[key], scale[key] = place(key, np.asarray(value, np.float32)), rate
        else:
            frozen[key] = place(key, value if isinstance(value, jax.Array) else np.asarray(value))

    for name, leaf in edge_leaves(params).items():
        put(name, leaf, np.array(rates[name], np.float32))
    for book, table in tables.items():
        put(keys[book], table, np.array(rates[keys[book]], np.float32))
    blocks = []
    for index, block in enumerate(params["blocks"]):
        books: dict[str, str] = {}

        def note(name: str, matrix: Any, books: dict[str, str] = books) -> Any:
            books[f"{name}{_TABLE}"] = keys.get(_book(matrix.codebook), "")
            return matrix

        block = _folded(_replaced(_with_gains(block), note), rates, f"layers.{index}", keys)
        leaves, structure = _leaves(block)
        shared = tuple((name, key) for name, key in books.items() if key and name in leaves)
        shapes = tuple((name, tuple(leaf.shape)) for name, leaf in leaves.items())
        blocks.append((leaves, structure, shared, shapes))
    segments = []
    start = 0
    while start < len(blocks):
        stop = start + 1
        while stop < len(blocks) and blocks[stop][1:] == blocks[start][1:]:
            stop += 1
        leaves, structure, shared, _ = blocks[start]
        segment = Segment(start, stop, tuple(leaves), structure, shared)
        for name in leaves:
            if name in dict(shared):
                continue
            column = [blocks[i][0][name] for i in range(start, stop)]
            rate = np.array([rates.get(f"layers.{i}.{name}", 0.0) for i in range(start, stop)], np.float32)
            stacked = np.stack([np.asarray(leaf) for leaf in column])
            put(segment.key(name), stacked, rate.reshape(-1, *(1,) * (stacked.ndim - 1)))
            for i in range(start, stop):
                blocks[i][0][name] = None  # the stack replaces them
        segments.append(segment)
        start = stop
    return Trainable(tuned, frozen, scale, Layout(tuple(segments)))


def _opened(block: Any) -> Any:
    """The block with every layer that decodes for itself decoded."""
    is_layer = lambda node: hasattr(node, "opened")  # noqa: E731
    return jax.tree.map(lambda node: node.opened() if is_layer(node) else node, block, is_leaf=is_layer)


def hidden(
    arrays: Mapping[str, Any],
    layout: Layout,
    tokens: Int[Array, "batch length"],
    config: ModelConfig,
    remat: bool,
    gather: Callable[[str, Array], Array] | None = None,
) -> Float[Array, "batch length width"]:
    """States after the last block of the model `arrays = tuned | frozen`.

    With `remat` the backward pass computes every block again instead of keeping its activations, and what a layer of it
    decodes, it decodes once: the dense weights of one block exist at a time. `gather(name, array)` makes whole the
    arrays of a layer, of the stack `name`, that come in parts.
    """
    edges = tree({name: array for name, array in arrays.items() if name.split(".")[0] == "embed"})
    x = transformer.embed(edges["embed"], tokens, config)
    for segment in layout.segments:
        shared = dict(segment.shared)
        stacked = {name: arrays[segment.key(name)] for name in segment.names if name not in shared}

        def body(x: Array, own: Named, segment: Segment = segment, shared: Named = shared) -> tuple[Array, None]:
            if gather is not None:
                own = {name: gather(segment.key(name), leaf) for name, leaf in own.items()}
            leaves = [arrays[shared[name]] if name in shared else own[name] for name in segment.names]
            block = jax.tree.unflatten(segment.structure, leaves)
            return transformer.block(_opened(block) if remat else block, x, config), None

        # Loops keep the second computation apart from the first; a loop of one step is none after compilation.
        apart = segment.stop - segment.start > 1
        x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=not apart) if remat else body, x, stacked)
    return x


def merged(params: Any, layout: Layout, tuned: Mapping[str, Any], dtype: Any = np.float16) -> Any:
    """`params` with the tuned values; gains of quantised matrices and relative scales are stored as `dtype`."""
    host = {key: np.asarray(value) for key, value in tuned.items()}
    result = {**params, "blocks": []}
    edges = edge_leaves(params)
    moved = {name: jax.device_put(host[name].astype(leaf.dtype)) for name, leaf in edges.items() if name in host}
    result |= tree(edges | moved)
    tables = {book: host[f"table.{i}"] for i, book in enumerate(_tables(params)) if f"table.{i}" in host}
    for index, block in enumerate(params["blocks"]):
        own = functools.partial(_of_layer, host, layout, index)

        def change(name: str, matrix: Any, own: Any = own) -> Any:
            gains = {part: own(f"{name}.{part}") for part in ("output_gain", "input_gain")}
            gains = {part: _stored(value, dtype) for part, value in gains.items() if value is not None}
            relative = own(f"{name}.scaling.relative")
            if relative is not None:
                gains["scaling"] = matrix.scaling.replace(relative=_stored(relative, dtype))
            table = tables.get(_book(matrix.codebook))
            if table is not None:
                gains["codebook"] = matrix.codebook.replace(table=_stored(table, matrix.codebook.table.dtype))
            return matrix.replace(**gains)

        result["blocks"].append(_dense_leaves_replaced(_replaced(block, change), own))
    return result


def _of_layer(host: Mapping[str, np.ndarray], layout: Layout, index: int, name: str) -> np.ndarray | None:
    segment = next(s for s in layout.segments if s.start <= index < s.stop)
    stacked = host.get(segment.key(name))
    return None if stacked is None else stacked[index - segment.start]


def layer_value(host: Mapping[str, np.ndarray], layout: Layout, name: str) -> np.ndarray | None:
    """The entry of one layer, `layers.3.mlp.up_proj.lora_a`, in the stacked arrays; None where it was not tuned."""
    _, index, rest = name.split(".", 2)
    return _of_layer(host, layout, int(index), rest)


def _stored(value: np.ndarray, dtype: Any) -> Any:
    """On the device in its storage type; a tuned value beyond float16 would be infinite there."""
    limit = float(jnp.finfo(dtype).max)
    return jax.device_put(np.clip(value, -limit, limit).astype(dtype))


def _dense_leaves_replaced(block: Any, own: Any, prefix: str = "") -> Any:
    result = {}
    for key, value in block.items():
        if isinstance(value, Mapping):
            result[key] = _dense_leaves_replaced(value, own, f"{prefix}{key}.")
        else:
            found = own(f"{prefix}{key}")  # None for a quantised matrix: its parts have longer names
            result[key] = value if found is None else jax.device_put(found.astype(value.dtype))
    return result
