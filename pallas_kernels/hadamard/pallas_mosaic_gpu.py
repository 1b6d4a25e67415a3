"""Hadamard transform on Hopper through Mosaic GPU: `H_{ab} = H_a ⊗ H_b` as two products on the tensor cores.

Rows of b values, 64 of them in a tile, are multiplied by H_b; then a rows at a time, the a × b matrix of a vector, from
the left by H_a, which is `I ⊗ H_a` for the vectors that share a tile. Entries of H are ±1, so only x can be rounded:
it goes in as a sum of bfloat16 terms, which have the exponents of float32, one for bfloat16 and three for float32, and
what is between the two products as two or three. Sums are float32. x is read and y is written once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.hadamard.reference import sylvester
from pallas_kernels.mosaic_gpu import multiprocessors, parameters, plgpu, tiled, unavailable

__all__ = ["hadamard", "obstacle"]

ROWS = 64
"""Rows of a tile: those of a tensor core's product, and the largest left factor."""
_SMALL = 128
"""Orders up to this are one product."""


def cannot(block: int) -> str | None:
    """The reason why this kernel computes no transform of order `block`, on any device; None when it does."""
    if not 16 <= block <= _SMALL * ROWS:
        return f"a tile has orders 16 to {_SMALL * ROWS}, found {block}"
    return None


def obstacle(block: int, dtype: Any) -> str | None:
    """The reason why the transform of order `block` cannot run here, None when it can."""
    return cannot(block) or unavailable()


def _terms(x: Array, count: int) -> list[Array]:
    """x, float32, as a sum of `count` bfloat16: 8 significant bits each."""
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found


def _body(
    x_gmem: Any, right_gmem: Any, left_gmem: Any, y_gmem: Any,
    x_smem: Any, right_smem: Any, left_smem: Any, inner_smem: Any, y_smem: Any, arrived: Any,
    *, tiles: int, terms: tuple[int, int], scale: float, folded: bool,
) -> None:  # fmt: skip
    program, programs = jax.lax.axis_index("program"), jax.lax.axis_size("program")
    plgpu.copy_gmem_to_smem(right_gmem, right_smem, arrived)
    plgpu.barrier_wait(arrived)
    if folded:
        plgpu.copy_gmem_to_smem(left_gmem, left_smem, arrived)
        plgpu.barrier_wait(arrived)

    def product(left: Any, right: Any, count: int) -> Array:
        def run(acc: Any) -> Array:
            for term in range(count):
                plgpu.wgmma(acc, *(ref if whole else ref.at[term] for ref, whole in (left, right)))
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, right_smem.shape[1]), jnp.float32))

    def tile(i: Any, _: None) -> None:
        at = pl.ds((program + i * programs) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x_gmem.at[at], x_smem, arrived)
        plgpu.barrier_wait(arrived)
        for term, part in enumerate(_terms(x_smem[...].astype(jnp.float32), terms[0])):
            inner_smem[term] = part
        plgpu.commit_smem()
        y = product((inner_smem, False), (right_smem, True), terms[0])
        if folded:
            for term, part in enumerate(_terms(y, terms[1])):
                inner_smem[term] = part
            plgpu.commit_smem()
            y = product((left_smem, True), (inner_smem, False), terms[1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_smem[...] = (y * np.float32(scale)).astype(y_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[at])

    jax.lax.fori_loop(0, jax.lax.div(tiles - program + programs - 1, programs), tile, None)
    plgpu.wait_smem_to_gmem(0)


def hadamard(
    x: Float[Array, "*batch n"], block: int, interpret: Any = None, processors: int | None = None
) -> Float[Array, "*batch n"]:
    """`x (I ⊗ H_block) / √block`, accumulated in float32; `processors` is the device's multiprocessors.

    Raises NotImplementedError for orders that no tile has.
    """
    reason = cannot(block)
    if reason is not None:
        raise NotImplementedError(f"hadamard: mosaic_gpu: {reason}")
    right = block if block <= _SMALL else max(_SMALL // 2, block // ROWS)
    left = block // right
    vectors = x.size // block
    rows = -(-vectors * left // ROWS) * ROWS
    flat = jnp.pad(x.reshape(vectors * left, right), ((0, rows - vectors * left), (0, 0)))
    terms = {jnp.dtype(jnp.bfloat16): (1, 2), jnp.dtype(jnp.float16): (2, 2)}.get(x.dtype, (3, 3))
    own = np.kron(np.eye(ROWS // left, dtype=np.float32), sylvester(left))
    available = multiprocessors() if processors is None else processors
    half, size = jnp.bfloat16, x.dtype.itemsize
    y = plgpu.kernel(
        functools.partial(_body, tiles=rows // ROWS, terms=terms, scale=1 / math.sqrt(block), folded=left > 1),
        out_type=jax.ShapeDtypeStruct((rows, right), x.dtype),
        grid=(min(rows // ROWS, 2 * available),),
        grid_names=("program",),
        scratch_types={
            "x_smem": plgpu.SMEM((ROWS, right), x.dtype, transforms=tiled(size, right)),
            "right_smem": plgpu.SMEM((right, right), half, transforms=tiled(2, right)),
            "left_smem": plgpu.SMEM((ROWS, ROWS), half, transforms=tiled(2, ROWS)),
            "inner_smem": plgpu.SMEM((max(terms), ROWS, right), half, transforms=tiled(2, right)),
            "y_smem": plgpu.SMEM((ROWS, right), x.dtype, transforms=tiled(size, right)),
            "arrived": plgpu.Barrier(),
        },
        compiler_params=parameters(),
        interpret=interpret,
        kernel_name="hadamard",
    )(flat, jnp.asarray(sylvester(right), half), jnp.asarray(own, half))
    return y[: vectors * left].reshape(x.shape)
