"""`x Wᵀ` with W packed: a streaming kernel for up to 16 rows, decode-then-multiply for more."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dequant_matmul import pallas_gpu, pallas_mosaic_gpu, pallas_tpu, reference, streaming
from pallas_kernels.dequant_matmul.layout import PackedMatrix
from pallas_kernels.dequant_matmul.rows import RowMatrix, from_rows, to_rows
from pallas_kernels.dispatch import KernelError, choose, runnable

__all__ = ["available", "chosen", "matmul", "prepared"]


def _generic(weight: PackedMatrix | RowMatrix) -> PackedMatrix:
    return from_rows(weight) if isinstance(weight, RowMatrix) else weight


def _xla(x: Array, weight: PackedMatrix | RowMatrix) -> Array:
    weight = _generic(weight)
    return (streaming if streaming.suits(x.shape[0], x.dtype, weight) else reference).matmul(x, weight)


_RUN: dict[str, Callable[..., Array]] = {
    "pallas_gpu": pallas_gpu.matmul,
    "mosaic_gpu": pallas_mosaic_gpu.matmul,
    "pallas_tpu": pallas_tpu.matmul,
    "xla": _xla,
}


def _obstacles(batch: int, dtype: Any, weight: PackedMatrix | RowMatrix) -> dict[str, Callable[[], str | None]]:
    """By kernel, the first choice first, the function that gives the reason why it cannot run."""
    kernels: dict[str, Callable[[], str | None]] = dict.fromkeys(
        ("pallas_gpu", "pallas_tpu"), lambda: "the matrix is arranged for mosaic_gpu"
    )
    mosaic = functools.partial(pallas_mosaic_gpu.obstacle, batch, dtype, weight)
    if isinstance(weight, PackedMatrix):
        kernels = {
            "pallas_gpu": functools.partial(pallas_gpu.obstacle, batch, weight),
            "mosaic_gpu": mosaic,
            "pallas_tpu": functools.partial(pallas_tpu.obstacle, batch, dtype, weight),
        }
    if tuned.mosaic_first("dequant_matmul", pallas_mosaic_gpu.key(batch, weight)):
        kernels = {"mosaic_gpu": mosaic, **kernels}
    return {**kernels, "mosaic_gpu": mosaic}


def available(batch: int, dtype: Any, weight: PackedMatrix | RowMatrix) -> list[str]:
    """All kernels that can run here for `batch` rows of `dtype`; XLA always can."""
    return runnable(_obstacles(batch, dtype, weight))


def chosen(batch: int, dtype: Any, weight: PackedMatrix | RowMatrix, implementation: str | None = None) -> str:
    """The implementation that runs for `batch` rows of `dtype`. Raises KernelError."""
    return choose("dequant_matmul", implementation, _obstacles(batch, dtype, weight))


_arrange = jax.jit(to_rows)


def prepared(weight: PackedMatrix, implementation: str | None = None) -> PackedMatrix | RowMatrix:
    """The matrix in the order of the kernel that decodes one row of bfloat16: to be called once, before many products.

    It is the matrix itself except for mosaic_gpu, which would rearrange it in every product. Raises KernelError.
    """
    return _arrange(weight) if chosen(1, jnp.bfloat16, weight, implementation) == "mosaic_gpu" else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _apply(x: Array, weight: PackedMatrix | RowMatrix, name: str) -> Array:
    return _RUN[name](x, weight)


def _forward(x: Array, weight: PackedMatrix | RowMatrix, name: str) -> tuple[Array, tuple[Array, Any]]:
    return _apply(x, weight, name), (x, weight)


def _backward(name: str, kept: tuple[Array, Any], y: Array) -> tuple[Any, Any]:
    return jax.vjp(lambda x, weight: reference.matmul(x, _generic(weight)), *kept)[1](y)


_apply.defvjp(_forward, _backward)


def matmul(
    x: Float[Array, "*batch in"], weight: PackedMatrix | RowMatrix, implementation: str | None = None
) -> Float[Array, "*batch out"]:
    """`y = x Wᵀ`, `W = scale · code + offset`, in the dtype of x (float32, bfloat16 or float16).

    Products are summed in float32. W is decoded in float32 and rounded to the dtype of x, as in the reference, or not
    at all: by pallas_gpu for one and two rows and for grids with scales of whole rows, by mosaic_gpu unless there are
    groups. Differentiable in x, scale and offset. Raises KernelError when x has not `in` columns, or a named
    implementation cannot run.
    """
    if x.shape[-1] != weight.shape[1]:
        raise KernelError(f"dequant_matmul: x has {x.shape[-1]} columns and the matrix {weight.shape[1]} inputs")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise KernelError(f"dequant_matmul: dtype {x.dtype}; allowed are float32, bfloat16, float16")
    batch = math.prod(x.shape[:-1])
    name = chosen(batch, x.dtype, weight, implementation)
    y: Any = _apply(x.reshape(batch, -1), weight, name if batch else "xla")
    return y.reshape(*x.shape[:-1], weight.shape[0])
