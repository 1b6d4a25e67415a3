"""`jax.jit` for large programs of many small loops, which take longer to compile than to run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

__all__ = ["LeanJit", "lean_jit"]

# XLA's fusion emitters make a module of its own of every fused loop. The rounding of a matrix has 200 of them: 5.2 s to
# compile, 2.7 s without, and the same time to run. The option was gone by jax 0.12.
_OPTIONS = {"xla_cpu_use_fusion_emitters": False}
_KNOWN_BEFORE = (0, 11)


class LeanJit:
    """A function under `jax.jit`, on a CPU with the options that compile it sooner, where this JAX has them.

    Inside another traced function it is the plain one: options are of whole programs.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, function)
        self._plain: Any = jax.jit(function, **options)
        self._lean: Any = jax.jit(function, compiler_options=_OPTIONS, **options)

    def chosen(self, *trees: Any) -> Any:
        """The function under `jax.jit` that a call with these arguments runs."""
        if jax.__version_info__ >= _KNOWN_BEFORE or jax.default_backend() != "cpu":
            return self._plain
        inside = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
        return self._plain if inside else self._lean

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.chosen(arguments, options)(*arguments, **options)

    def lower(self, *arguments: Any, **options: Any) -> Any:
        """As that of `jax.jit`."""
        return self.chosen(arguments, options).lower(*arguments, **options)

    def eval_shape(self, *arguments: Any, **options: Any) -> Any:
        """As that of `jax.jit`."""
        return self.chosen(arguments, options).eval_shape(*arguments, **options)

    def _cache_size(self) -> int:
        """As that of `jax.jit`: how many programs calls have made."""
        return self._plain._cache_size() + self._lean._cache_size()


def lean_jit(**options: Any) -> Callable[[Callable[..., Any]], LeanJit]:
    """Decorator: `LeanJit` with these options of `jax.jit`."""
    return functools.partial(LeanJit, **options)
