"""flax.linen modules as traced functions."""

from __future__ import annotations

from typing import Any

from flax import linen

from qjax.errors import InputError
from qjax.function.traced import Traced
from qjax.function.traced import trace as trace_function

__all__ = ["trace"]


def trace(module: Any, variables: Any, *inputs: Any, unused: str = "refuse", **options: Any) -> Traced:
    """`module.apply(variables, *inputs, **options)` as a function of its variables.

    Raises InputError as `qjax.trace`.
    """
    if not isinstance(module, linen.Module):
        raise InputError(f"qjax.linen takes a flax.linen module, and {type(module).__name__} is none; use qjax.trace")
    return trace_function(lambda own, *x: module.apply(own, *x, **options), variables, *inputs, unused=unused)
