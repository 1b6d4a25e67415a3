"""The Hadamard transform of power-of-two order along the last axis, of whole rows or of consecutive blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuned
from pallas_kernels.dispatch import KernelError, choose, runnable
from pallas_kernels.hadamard import pallas_gpu, pallas_mosaic_gpu, pallas_tpu, reference

__all__ = ["available", "chosen", "hadamard"]

_KERNELS = {"pallas_gpu": pallas_gpu, "mosaic_gpu": pallas_mosaic_gpu, "pallas_tpu": pallas_tpu}
_RUN = {**{name: kernel.hadamard for name, kernel in _KERNELS.items()}, "xla": reference.hadamard}


def _obstacles(block: int, dtype: Any) -> dict[str, Callable[[], str | None]]:
    """By kernel, the first choice first, the function that gives the reason why it cannot run."""
    kernels: dict[str, Callable[[], str | None]] = {
        name: functools.partial(kernel.obstacle, block, dtype) for name, kernel in _KERNELS.items()
    }
    if tuned.mosaic_first("hadamard", f"order {block}"):
        kernels = {"mosaic_gpu": kernels["mosaic_gpu"], **kernels}
    return kernels


def available(block: int, dtype: Any) -> list[str]:
    """All kernels that can run here for the order `block`; XLA always can."""
    return runnable(_obstacles(block, dtype))


def chosen(block: int, dtype: Any, implementation: str | None = None) -> str:
    """The implementation that runs for the order `block`. Raises KernelError."""
    return choose("hadamard", implementation, _obstacles(block, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _apply(x: Array, block: int, name: str) -> Array:
    return _RUN[name](x, block)


def _forward(x: Array, block: int, name: str) -> tuple[Array, None]:
    return _apply(x, block, name), None


def _backward(block: int, name: str, _: None, y: Array) -> tuple[Array]:
    return (_apply(y, block, name),)  # the matrix is symmetric


_apply.defvjp(_forward, _backward)


def hadamard(
    x: Float[Array, "*batch n"], block: int | None = None, implementation: str | None = None
) -> Float[Array, "*batch n"]:
    """`x (I ⊗ H_block) / √block` with Sylvester's H along the last axis; `block=None` is all of it.

    Accumulates in float32 and returns the dtype of x (float32, bfloat16 or float16). Its own inverse and its own
    derivative. Raises KernelError when the order is no power of two, does not divide n, or a named implementation
    cannot run.

    Source: the randomised Hadamard transform of QuIP# (2402.04396, section 3) without its signs.
    """
    n = x.shape[-1]
    order = n if block is None else block
    if order < 1 or order & (order - 1) or n % order:
        raise KernelError(f"hadamard: order {order} for rows of {n} values; it is a power of two that divides them")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise KernelError(f"hadamard: dtype {x.dtype}; allowed are float32, bfloat16, float16")
    name = chosen(order, x.dtype, implementation)
    return _apply(x, order, "xla" if x.size == 0 else name)
