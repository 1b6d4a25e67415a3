"""Arrays outside of a model's blocks by name: "norm", "embed", "head", or "embed.positions", "norm.bias"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["by_name", "edge_leaves", "own_head", "tree"]


def by_name(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= by_name(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionaries of `by_name`, with a "norm" also where a model has nothing behind its blocks."""
    result: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *groups, last = name.split(".")
        node = result
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return {"norm": {}, **result}


def edge_leaves(params: Any) -> dict[str, Any]:
    """The leaves of a model outside of its blocks, by name."""
    return by_name({part: params[part] for part in ("norm", "embed", "head") if part in params})


def own_head(names: Any) -> dict[str, str]:
    """For every array of the last step, by its name in `transformer.head`, its name in the model."""
    table = next(name for name in ("head", "embed.tokens", "embed") if name in names)
    return {name: name for name in names if name.split(".")[0] == "norm"} | {"head": table}
