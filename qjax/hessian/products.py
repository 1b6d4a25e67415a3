"""Products of a step's rows, sums that lose no small terms, and the first sequence that is not finite."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.gram import gram

__all__ = ["NONE", "first_bad", "kahan", "masked", "product", "second_moment"]

NONE = np.uint32(2**32 - 1)


def masked(inputs: Array, mask: Array) -> Array:
    """`[batch, length, n]` float32, with zeros for what does not count, also where it is not finite."""
    return jnp.where(mask[:, None, None] > 0, inputs.astype(jnp.float32), 0)


def second_moment(rows: Array) -> Array:
    """`Xᵀ X`: XLA's whole product, or what `QJAX_GRAM` names of `pallas_kernels.gram` when the program is traced.

    Those compute one triangle, half of the work. Whether one is faster anywhere is not measured: none is the default.
    """
    name = os.environ.get("QJAX_GRAM", "")
    return gram(rows.reshape(-1, rows.shape[-1]), name) if name else product(rows, rows)


def product(a: Array, b: Array) -> Array:
    """`Aᵀ B` over all rows, in full precision."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def first_bad(numbers: Array, product: Array, *rows: Array) -> Array:
    """The number of the first sequence with a value or a sum of squares that is not finite, `NONE` without one.

    Sums of squares bound every entry of a sequence's product. Where only the sum over the batch overflows, its first
    sequence is named.
    """
    broken = jnp.any(~jnp.isfinite(jnp.stack([jnp.sum(jnp.square(x), axis=1) for x in rows])), axis=(0, 2))
    named = jnp.where(jnp.any(broken), jnp.argmax(broken), 0)
    wrong = jnp.any(broken) | ~jnp.all(jnp.isfinite(product))
    return jnp.where(wrong, jax.lax.dynamic_index_in_dim(numbers, named, keepdims=False), NONE)


def kahan(total: Array, carry: Array, addend: Array) -> tuple[Array, Array]:
    """`total - carry + addend` in two parts again: the sum, and what its rounding has added to it."""
    addend = addend - carry
    after = total + addend
    return after, (after - total) - addend
