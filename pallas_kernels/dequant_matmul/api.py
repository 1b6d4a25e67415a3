"""`x Wᵀ` with W packed: a streaming kernel for up to 16 rows, decode-then-multiply for more."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dequant_matmul import pallas_gpu, pallas_tpu, reference, streaming
from pallas_kernels.dequant_matmul.layout import PackedMatrix
from pallas_kernels.dispatch import KernelError, choose

__all__ = ["chosen", "matmul"]


def _xla(x: Array, weight: PackedMatrix) -> Array:
    return (streaming if streaming.suits(x.shape[0], x.dtype, weight) else reference).matmul(x, weight)


_RUN = {"pallas_gpu": pallas_gpu.matmul, "pallas_tpu": pallas_tpu.matmul, "xla": _xla}


def chosen(batch: int, dtype: Any, weight: PackedMatrix, implementation: str | None = None) -> str:
    """The implementation that runs for `batch` rows of `dtype`. Raises KernelError."""
    kernels = {
        "pallas_gpu": functools.partial(pallas_gpu.obstacle, batch, weight),
        "pallas_tpu": functools.partial(pallas_tpu.obstacle, batch, dtype, weight),
    }
    return choose("dequant_matmul", implementation, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _apply(x: Array, weight: PackedMatrix, name: str) -> Array:
    return _RUN[name](x, weight)


def _forward(x: Array, weight: PackedMatrix, name: str) -> tuple[Array, tuple[Array, PackedMatrix]]:
    return _apply(x, weight, name), (x, weight)


def _backward(name: str, kept: tuple[Array, PackedMatrix], y: Array) -> tuple[Any, Any]:
    return jax.vjp(reference.matmul, *kept)[1](y)


_apply.defvjp(_forward, _backward)


def matmul(
    x: Float[Array, "*batch in"], weight: PackedMatrix, implementation: str | None = None
) -> Float[Array, "*batch out"]:
    """`y = x Wᵀ`, `W = scale · code + offset`, in the dtype of x (float32, bfloat16 or float16).

    W is decoded in float32, rounded to the dtype of x, and products are summed in float32. Differentiable in x, scale
    and offset. Raises KernelError when x has not `in` columns, or a named implementation cannot run.
    """
    if x.shape[-1] != weight.shape[1]:
        raise KernelError(f"dequant_matmul: x has {x.shape[-1]} columns and the matrix {weight.shape[1]} inputs")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise KernelError(f"dequant_matmul: dtype {x.dtype}; allowed are float32, bfloat16, float16")
    batch = math.prod(x.shape[:-1])
    name = chosen(batch, x.dtype, weight, implementation)
    y: Any = _apply(x.reshape(batch, -1), weight, name if batch else "xla")
    return y.reshape(*x.shape[:-1], weight.shape[0])
