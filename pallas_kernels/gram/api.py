"""`Xᵀ X` for the second moments of a Hessian."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import KernelError, choose, runnable
from pallas_kernels.gram import pallas_mosaic_gpu, pallas_tpu, reference

__all__ = ["available", "chosen", "gram"]

_RUN = {"mosaic_gpu": pallas_mosaic_gpu.gram, "pallas_tpu": pallas_tpu.gram, "xla": reference.gram}


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
    kernels = {"mosaic_gpu": pallas_mosaic_gpu.obstacle, "pallas_tpu": pallas_tpu.obstacle}
    return {name: functools.partial(obstacle, dtype) for name, obstacle in kernels.items()}


def gram(x: Float[Array, "rows n"], implementation: str | None = None) -> Float[Array, "n n"]:
    """`Xᵀ X`, summed in float32 from float32 or bfloat16, exactly symmetric: only the lower triangle is computed.

    Raises KernelError for another dtype and when a named implementation cannot run.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise KernelError(f"gram: dtype {x.dtype}; allowed are float32 and bfloat16")
    return _RUN["xla" if x.size == 0 else chosen(x.dtype, implementation)](x)
