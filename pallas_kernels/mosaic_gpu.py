"""The Pallas Mosaic GPU backend in one place: whether this jax and this device have it, and its parameters.

Its kernels name the memories and the layouts by hand: packed words come by asynchronous copies into shared memory, are
decoded in registers, go back to shared memory as float16 and are multiplied by the tensor cores of a whole warpgroup
(`wgmma`, which Hopper has and no other generation). It has no gather: codes with a table stay with Triton.
"""

from __future__ import annotations

from typing import Any

import jax

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # a jaxlib without it
    plgpu = None

__all__ = ["MULTIPROCESSORS", "multiprocessors", "parameters", "plgpu", "tiled", "unavailable"]

MULTIPROCESSORS = 132
"""Of an H100 and an H200; assumed where there is no device to ask, as when a program is exported."""


def unavailable() -> str | None:
    """The reason why no Mosaic GPU kernel can run with this jax on the default device, None when one can."""
    if plgpu is None:
        return "this jax has no Pallas Mosaic GPU backend"
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability.split(".")[0] != "9":
        return f"it multiplies by wgmma, which GPUs of compute capability 9 have, found {capability}"
    return None


def multiprocessors() -> int:
    """Streaming multiprocessors of the default device."""
    return int(getattr(jax.devices()[0], "core_count", None) or MULTIPROCESSORS)


def parameters() -> Any:
    """Compiler parameters: a warpgroup is one thread of the program, layouts of arrays are inferred."""
    assert plgpu is not None
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def tiled(itemsize: int, columns: int) -> tuple[Any, Any]:
    """Layout of a matrix in shared memory for wgmma, without bank conflicts: tiles of 8 rows, 16-byte units swizzled.

    `columns` of `itemsize` bytes are a multiple of the swizzled width: 128, 64 or 32 bytes, the widest that divides.
    """
    assert plgpu is not None
    width = next(w for w in (128, 64, 32) if columns * itemsize % w == 0)
    return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)
