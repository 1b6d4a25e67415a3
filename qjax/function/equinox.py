"""Equinox modules as traced functions."""

from __future__ import annotations

import importlib
from typing import Any

from qjax.errors import InputError, missing_extra
from qjax.function.traced import Traced
from qjax.function.traced import trace as trace_function

__all__ = ["merge", "trace"]


def trace(module: Any, *inputs: Any, unused: str = "refuse") -> Traced:
    """`module(*inputs)` as a function of its arrays of floating-point numbers.

    A layer that takes one example is traced with one, or, as `lambda p, x: jax.vmap(...)(x)`, by `qjax.trace`. Raises
    InputError as `qjax.trace`, and without Equinox.
    """
    eqx = _equinox()
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return trace_function(lambda own, *x: eqx.combine(own, rest)(*x), params, *inputs, unused=unused)


def merge(module: Any, traced: Traced, params: Any) -> Any:
    """A module like `module` with the dense values of `params`, in which operators may stand."""
    eqx = _equinox()
    _, rest = eqx.partition(module, eqx.is_inexact_array)
    return eqx.combine(traced.dense(params), rest)


def _equinox() -> Any:
    try:
        return importlib.import_module("equinox")
    except ImportError as error:
        raise InputError(f"qjax.equinox {missing_extra('equinox', 'equinox')}") from error
