"""A model on a mesh of devices: parts of every linear on the axis "model", batches on the axis "data"."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import InputError
from qjax.models.config import ModelConfig
from qjax.models.families import family
from qjax.models.linear import linears_of
from qjax.models.on_mesh import Axes
from qjax.models.structure import Linear, structure
from qjax.runtime.mesh import place
from qjax.tensor_parallel.matrices import (
    AXIS,
    RowParallelDense,
    Stacked,
    column_parallel,
    row_parallel,
)
from qjax.typing import Leaf, pytree, static

__all__ = ["MeshBlock", "check", "collectives", "device_bytes", "distribute", "summary"]

_BATCH = "data"
_SHARED_FROM = 4096  # bytes from which equal arrays of several matrices are placed once


def _array_spec(axes: Axes) -> P:
    names = [{"batch": _BATCH, "heads": AXIS, None: None}[axis] for axis in axes]
    while names and names[-1] is None:  # as results of programs have it: equal shardings share programs
        names.pop()
    return P(*names)


@pytree
class MeshBlock:
    """The parameters of a block on a mesh, `qjax.models.on_mesh.OverMesh`."""

    parameters: Leaf
    mesh: Mesh = static()

    @property
    def rows(self) -> int:
        """The divisor of every batch: the devices of the axis "data"."""
        return self.mesh.shape[_BATCH]

    def sharding(self, axes: Axes) -> NamedSharding:
        """The sharding of an array with these axes."""
        return NamedSharding(self.mesh, _array_spec(axes))

    def run(
        self, function: Callable[..., Any], config: ModelConfig, arrays: tuple[Any, ...], axes: Any, results: Any
    ) -> Any:
        """`function(parameters, config, *arrays)` on every device; see `OverMesh`.

        Raises InputError for a batch that the axis "data" does not divide.
        """
        for array, names in zip(arrays, axes, strict=True):
            if names and names[0] == "batch" and array.shape[0] % self.rows:
                raise InputError(
                    f"a batch of {array.shape[0]} does not divide among mesh.data={self.rows} devices; "
                    f"use a batch that is a multiple of {self.rows}"
                )
        several = isinstance(results[0], tuple)
        own = local_config(config, self.mesh.shape[AXIS])
        mapped = jax.shard_map(
            lambda parameters, *arrays: function(parameters, own, *arrays),
            mesh=self.mesh,
            in_specs=(_specs(self.parameters, config, self.mesh), *(_array_spec(names) for names in axes)),
            out_specs=tuple(map(_array_spec, results)) if several else _array_spec(results),
            check_vma=False,  # kernels inside cannot say on which axes their results vary
        )
        return mapped(self.parameters, *arrays)


def local_config(config: ModelConfig, count: int) -> ModelConfig:
    """The part of a model that one of `count` devices sees: its heads and its features of the hidden layer."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // count,
        num_kv_heads=config.num_kv_heads // count,
        intermediate_size=config.intermediate_size // count,
    )


def check(config: ModelConfig, count: int) -> None:
    """Raises InputError unless the family can be cut, and key/value heads, heads and the hidden layer divide.

    `count` is the number of devices that they divide among.
    """
    if count > 1 and (why := family(config).whole) is not None:
        raise InputError(
            f"mesh.model is {count}; the blocks of {config.architecture} cannot be cut into parts ({why}): use "
            "mesh.model=1, which splits sequences"
        )
    if count > 1 and structure(config).experts:
        raise InputError(
            f"mesh.model is {count}; {config.architecture} is a mixture of experts, and matrices of experts are not "
            "shared out among devices: use mesh.model=1, and mesh.data for more sequences at once"
        )
    common = math.gcd(config.num_kv_heads, config.num_heads, config.intermediate_size)
    if common % count:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise InputError(
            f"mesh.model is {count}; this model has {config.num_heads} heads, {config.num_kv_heads} key/value heads "
            f"and {config.intermediate_size} hidden features, which must all divide among the devices: allowed are "
            f"{allowed}"
        )


def _linear(linear: Linear, entry: Mapping[str, Any], count: int, packed: bool) -> dict[str, Any]:
    """The entry of a linear with its weight's parts, on the host."""
    weight, by_rows = entry["weight"], linear.row_parallel
    if hasattr(weight, "matmul"):
        try:
            weight = (row_parallel if by_rows else column_parallel)(weight, count, packed)
        except InputError as error:
            raise InputError(f"{linear.name} is {error}") from error
    elif by_rows:
        weight = RowParallelDense(weight)
    return {**entry, "weight": weight}


def _linear_specs(linear: Linear, entry: Mapping[str, Any]) -> dict[str, Any]:
    weight, by_rows = entry["weight"], linear.row_parallel
    if hasattr(weight, "matmul") and not isinstance(weight, RowParallelDense):
        stacked = lambda node: isinstance(node, Stacked)  # noqa: E731
        specs: Any = jax.tree.map(
            lambda node: jax.tree.map(lambda _: P(AXIS), node) if stacked(node) else P(), weight, is_leaf=stacked
        )
    else:
        specs = RowParallelDense(P(None, AXIS)) if by_rows else P(AXIS, None)
    return {key: specs if key == "weight" else P() if by_rows else P(AXIS) for key in entry}


def _by_linear(
    block: Mapping[str, Any], linears: Mapping[str, Linear], change: Callable[..., Any], other: Any, prefix: str = ""
) -> dict[str, Any]:
    """The block with `change(linear, entry)` for every linear and `other(leaf)` for all else."""
    result: dict[str, Any] = {}
    for key, value in block.items():
        name = prefix + key
        if name in linears:
            result[key] = change(linears[name], value)
        elif isinstance(value, Mapping):
            result[key] = _by_linear(value, linears, change, other, f"{name}.")
        else:
            result[key] = other(value)
    return result


def _linears(config: ModelConfig) -> dict[str, Linear]:
    return {linear.name: linear for linear in structure(config).linears}


def _specs(block: Mapping[str, Any], config: ModelConfig, mesh: Mesh) -> Any:
    """The partition of a block's arrays; one spec may stand for a whole subtree."""
    return P() if mesh.shape[AXIS] == 1 else _by_linear(block, _linears(config), _linear_specs, lambda _: P())


def distribute(params: Any, config: ModelConfig, mesh: Mesh, packed: bool = True) -> Any:
    """The parameters of a model on a mesh: they go where `params` went, in evaluation and generation.

    Dense and quantised matrices are cut into parts, one per device of the axis "model"; codes stay packed (with
    `packed`, in the layout of the kernels). Embedding and head are cut along the vocabulary where it divides. With one
    device on that axis everything is whole on every device, and only batches are split. The original is not needed any
    more. Raises InputError as `check` does, or for a matrix of another kind.
    """
    count = mesh.shape[AXIS]
    check(config, count)
    placed: dict[Any, jax.Array] = {}

    def put(leaf: Any, spec: P) -> jax.Array:
        host = np.asarray(leaf)
        if spec != P() or host.nbytes < _SHARED_FROM:
            return place(host, mesh, spec)
        key = (host.shape, str(host.dtype), host.tobytes())
        if key not in placed:
            placed[key] = place(host, mesh, spec)
        return placed[key]

    result = {}
    for name, value in params.items():
        if name == "blocks":
            continue
        specs = jax.tree_util.tree_map_with_path(functools.partial(_edge_spec, name, count=count), value)
        result[name] = jax.tree.map(put, value, specs)
    linear, linears = functools.partial(_linear, count=count, packed=packed), _linears(config)
    result["blocks"] = []
    for block in params["blocks"]:
        host = block if count == 1 else _by_linear(block, linears, linear, lambda leaf: leaf)
        specs = _broadcast(_specs(host, config, mesh), host)
        result["blocks"].append(MeshBlock(jax.tree.map(put, host, specs), mesh))
    return result


def _edge_spec(name: str, path: tuple[Any, ...], leaf: Any, *, count: int) -> P:
    """The partition of an array outside of the blocks: a table of the vocabulary by its rows, where these divide.

    A quantised table is whole on every device.
    """
    key = getattr(path[-1], "key", None) if path else None
    table = not path if name == "head" else name == "embed" and (not path or key == "tokens")
    return P(AXIS, None) if table and leaf.shape[0] % count == 0 else P()


def _broadcast(specs: Any, tree: Any) -> Any:
    """A spec for every leaf."""
    return jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def collectives(params: Any) -> dict[str, Counter[str]]:
    """Values per token that every linear of the first block communicates, by collective."""
    block = params["blocks"][0].parameters
    return {name: Counter(getattr(weight, "collectives", {})) for name, weight in linears_of(block).items()}


def summary(params: Any) -> str:
    """One line: devices, bytes on each, and what a token makes a block communicate."""
    mesh = params["blocks"][0].mesh
    total = sum(collectives(params).values(), Counter())
    values = ", ".join(f"{count} values by {name}" for name, count in sorted(total.items())) or "nothing"
    most = max(device_bytes(params).values()) / 1e6
    return (
        f"mesh of {mesh.shape[_BATCH]} × {mesh.shape[AXIS]} devices (data × model): {most:.1f} MB of parameters on "
        f"each, a block communicates {values} per token"
    )


def device_bytes(params: Any) -> dict[int, int]:
    """Bytes of parameters on every device of this process, by its id."""
    found: Counter[int] = Counter()
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(params)}.values():
        for shard in leaf.addressable_shards:
            found[shard.device.id] += shard.data.nbytes
    return dict(sorted(found.items()))
