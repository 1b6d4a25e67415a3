"""The Pallas Triton backend in one place: whether this jax has it, and its parameters.

Every operation has a kernel for it: Triton finds the layouts of arrays itself, runs on GPUs before Hopper too, and can
look values up in a table, which Pallas' other GPU backend, Mosaic (`mosaic_gpu.py`), cannot. The trellis search changes
axes between two steps, for which Mosaic has no layout. Triton is deprecated from jax 0.11 on; where it is gone,
operations fall back to Mosaic, then to XLA.
"""

from __future__ import annotations

import warnings
from typing import Any

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
except ImportError:  # a jax without it
    triton = None

__all__ = ["parameters", "unavailable"]


def unavailable() -> str | None:
    """Why no Triton kernel can run with this jax, None when one can."""
    return "this jax has no Pallas Triton backend" if triton is None else None


def parameters(warps: int, stages: int = 1) -> Any:
    """Compiler parameters of a kernel of `32 warps` threads."""
    assert triton is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return triton.CompilerParams(num_warps=warps, num_stages=stages)
