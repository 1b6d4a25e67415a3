"""Blocks that lie on a mesh of devices, told apart from plain parameters.

A block is a function of one device's arrays. On a mesh it runs on every device with the parts that lie there: whole
heads and whole features of the hidden layer, so that only the products that sum over devices have to communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from qjax.models.config import ModelConfig

__all__ = ["CACHE", "HIDDEN", "ROWS", "Axes", "OverMesh", "placed", "spread"]

Axes = tuple[str | None, ...]
"""The meaning of every axis of an array: "batch" and "heads" may be split over devices, None is whole on each."""

ROWS: Axes = ("batch",)
HIDDEN: Axes = ("batch", None, None)
CACHE: Axes = ("batch", "heads", None, None)


@runtime_checkable
class OverMesh(Protocol):
    """The parameters of a block on a mesh."""

    def run(
        self, function: Callable[..., Any], config: ModelConfig, arrays: tuple[Any, ...], axes: Any, results: Any
    ) -> Any:
        """`function(parameters, config, *arrays)` on every device, with its parts and the configuration of its part.

        `axes` has the `Axes` of every array, `results` those of the results (one, or a tuple).
        """
        ...

    def sharding(self, axes: Axes) -> jax.sharding.Sharding:
        """The sharding of an array with these axes."""
        ...

    @property
    def rows(self) -> int:
        """The divisor of every batch."""
        ...


def placed(x: Any, block: Any, axes: Axes = HIDDEN) -> Any:
    """`x` where a block on a mesh expects it, so that all blocks share one program; as it is for other blocks."""
    return jax.device_put(x, block.sharding(axes)) if isinstance(block, OverMesh) else x


def spread(
    function: Callable[..., Any], parameters: Any, config: ModelConfig, arrays: tuple[Any, ...], axes: Any, results: Any
) -> Any:
    """`function(parameters, config, *arrays)`, over a mesh where the parameters lie on one; see `OverMesh.run`."""
    if isinstance(parameters, OverMesh):
        return parameters.run(function, config, arrays, axes, results)
    return function(parameters, config, *arrays)
