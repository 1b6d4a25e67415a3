"""The matrices outside of the blocks: the embedding's table and the head, which may be one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.models.config import ModelConfig
from qjax.models.families import family
from qjax.models.linear import Operator

__all__ = ["EDGES", "Edge", "edge_matrices", "edge_names", "edge_operators", "edge_weight", "with_edges"]

EDGES = ("embed", "head")
"""Their names, as those of layers are `layers.0.mlp.up_proj`."""

_TABLES = ("embed", "embed/tokens")  # the table's place in the parameters: an embedding may have other parts


@dataclasses.dataclass(frozen=True)
class Edge:
    """One matrix outside of the blocks.

    Attributes:
      name: "embed" or "head"; "embed" where the head is the embedding's table.
      path: its place in the parameters.
      shape: [vocabulary, features].
      tied: whether it is both.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, int]
    tied: bool


def edge_matrices(config: ModelConfig) -> dict[str, Edge]:
    """The matrices outside of a model's blocks by name, in the order of the forward pass; one where they are tied."""
    shapes = dict(family(config).edge_tensors(config).values())
    found = {}
    tied = "head" not in shapes
    for path, shape in shapes.items():
        if path in (*_TABLES, "head"):
            name = "head" if path == "head" else "embed"
            found[name] = Edge(name, tuple(path.split("/")), (shape[0], shape[1]), tied)
    return {name: found[name] for name in EDGES if name in found}


def edge_names(config: ModelConfig) -> list[str]:
    """The names of the matrices outside of the blocks."""
    return list(edge_matrices(config))


def edge_weight(params: Mapping[str, Any], edge: Edge) -> Any:
    """The matrix of an edge in a model's parameters."""
    node: Any = params
    for key in edge.path:
        node = node[key]
    return node


def with_edges(params: Any, matrices: Mapping[str, Any], config: ModelConfig) -> Any:
    """A model's parameters with other matrices outside of the blocks, by name."""
    result, known = dict(params), edge_matrices(config)
    for name, matrix in matrices.items():
        *groups, last = known[name].path
        node = result
        for group in groups:
            node[group] = dict(node[group])
            node = node[group]
        node[last] = matrix
    return result


def edge_operators(params: Mapping[str, Any]) -> dict[str, Any]:
    """The matrices outside of the blocks that are operators, by name."""
    table = params.get("embed")
    table = table.get("tokens") if isinstance(table, Mapping) else table
    found = {"embed": table, "head": params.get("head")}
    return {name: matrix for name, matrix in found.items() if isinstance(matrix, Operator)}
