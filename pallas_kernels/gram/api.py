"""`Xᵀ X` for the second moments of a Hessian."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import KernelError, choose, runnable
from pallas_kernels.gram import reference

__all__ = ["available", "chosen", "gram"]

_KERNELS = {"mosaic_gpu": "pallas_mosaic_gpu", "pallas_tpu": "pallas_tpu"}


def _kernel(name: str) -> Any:
    """The module of a kernel, imported when it is asked for: Pallas takes half a second."""
    return importlib.import_module(f"pallas_kernels.gram.{_KERNELS[name]}")


def chosen(dtype: Any, implementation: str | None = None) -> str:
    """The implementation that runs: XLA unless another one is named. Raises KernelError.

    A kernel halves the multiplications, as the reference nearly does; that it beats XLA's matrix product on any device
    is not measured, so None never takes it.
    """
    return choose("gram", implementation or "xla", _obstacles(dtype))


def available(dtype: Any) -> list[str]:
    """All kernels that can run here; XLA always can."""
    return runnable(_obstacles(dtype))


def _obstacles(dtype: Any) -> dict[str, Callable[[], str | None]]:
    return {name: lambda name=name: _kernel(name).obstacle(dtype) for name in _KERNELS}


def gram(x: Float[Array, "rows n"], implementation: str | None = None) -> Float[Array, "n n"]:
    """`Xᵀ X`, summed in float32 from float32 or bfloat16, exactly symmetric: only the lower triangle is computed.

    Raises KernelError for another dtype and when a named implementation cannot run.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise KernelError(f"gram: dtype {x.dtype}; allowed are float32 and bfloat16")
    name = "xla" if x.size == 0 else chosen(x.dtype, implementation)
    return (reference if name == "xla" else _kernel(name)).gram(x)
