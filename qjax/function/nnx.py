"""flax.nnx modules as traced functions."""

from __future__ import annotations

from typing import Any

from flax import nnx

from qjax.errors import InputError
from qjax.function.traced import Traced
from qjax.function.traced import trace as trace_function

__all__ = ["merge", "trace"]


def trace(module: Any, *inputs: Any, unused: str = "refuse", **options: Any) -> Traced:
    """`module(*inputs, **options)` as a function of its `nnx.Param`s; all other state is taken as it is now.

    What a call changes in that state (running means, counters of random streams) does not last. Raises InputError as
    `qjax.trace`.
    """
    _checked(module)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def run(params: Any, *own: Any) -> Any:
        return nnx.merge(graph, params, rest, copy=True)(*own, **options)  # a copy: a call may write to its state

    return trace_function(run, params, *inputs, unused=unused)


def merge(module: Any, traced: Traced, params: Any) -> nnx.Module:
    """A module like `module` with the dense values of `params`, in which operators may stand."""
    _checked(module)
    graph, _, rest = nnx.split(module, nnx.Param, ...)
    return nnx.merge(graph, traced.dense(params), rest)


def _checked(module: Any) -> None:
    if not isinstance(module, nnx.Module):
        raise InputError(f"qjax.nnx takes a flax.nnx module, and {type(module).__name__} is none; use qjax.trace")
