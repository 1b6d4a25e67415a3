"""Random operands of every operation, and the cost of dense weights on the same shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dequant_matmul import PackedMatrix, from_codes, repack_lattice, repack_trellis
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.dequant_matmul.tables import LATTICES, TRELLISES

__all__ = ["LAYER", "RATE", "describe", "packed"]

RATE = {"gpu": 1e12, "tpu": 5e11, "cpu": 3e9}
"""Bytes per second, roughly: how many calls fill the least time of a repeat."""

LAYER = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
"""(out, in) of the matrices of a layer of Llama-3-8B."""


def describe(spec: Spec) -> str:
    """One line for tables."""
    group = "" if spec.group is None else f" groups of {spec.group}"
    return f"{spec.code or 'scalar'} {spec.bits} bits {spec.out}x{spec.inner}{group}, {spec.batch} rows"


def packed(spec: Spec, key: jax.Array) -> PackedMatrix:
    """A matrix of uniformly random codes: every code of a width is as likely, as after any good quantiser.

    Tables are random too, of the sizes and value ranges of the real ones; float32 scales `1 / √in`.
    """
    scale = jnp.full((spec.out, 1), spec.inner**-0.5, jnp.float32)
    shape, count = (spec.out, spec.inner), spec.out * spec.inner
    if spec.code is None:
        codes = jax.random.bits(key, shape, jnp.uint8) & np.uint8(2**spec.bits - 1)
        groups = 1 if spec.group is None else -(-spec.inner // spec.group)
        scale = jnp.broadcast_to(scale, (spec.out, groups))
        return jax.jit(from_codes, static_argnums=(1, 4))(
            codes, spec.bits, scale, scale * np.float32(0.5 - 2 ** (spec.bits - 1)), spec.group
        )
    words = jax.random.bits(key, (-(-count * spec.bits // 32),), jnp.uint32)
    first, second = jax.random.bits(key, (2, 256), jnp.uint32)
    if spec.code in LATTICES:
        residual = None if spec.bits == 2 else 3.45
        tables = (first, second if spec.bits == 3 else None)

        def lattice(words: Any, scale: Any) -> PackedMatrix:
            return repack_lattice(words, spec.bits, shape, scale, *tables, residual)

        return jax.jit(lattice)(words, scale)
    table = jax.random.normal(key, (512, 2), jnp.float32) if spec.code in TRELLISES else None
    code = spec.code

    def trellis(words: Any, scale: Any) -> PackedMatrix:
        return repack_trellis(words, spec.bits, shape, scale, code, spec.L, table)

    return jax.jit(trellis)(words, scale)
