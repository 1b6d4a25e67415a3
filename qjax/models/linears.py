"""The weights of a block's linears by their names, e.g. "mlp.down_proj"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["linear_weight", "replace_linears"]


def linear_weight(parameters: Any, linear: str) -> Any:
    """The weight of one linear of a block."""
    group, leaf = linear.split(".")
    return parameters[group][leaf]["weight"]


def replace_linears(parameters: Any, matrices: Mapping[str, Any]) -> Any:
    """A block's parameters with the weights of some linears replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    for linear, matrix in matrices.items():
        group, leaf = linear.split(".")
        result[group][leaf] = {**result[group][leaf], "weight": matrix}
    return result
