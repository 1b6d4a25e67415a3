"""Sums in a number format that keep what rounding took away (Kahan)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.formats.base import NumberFormat

__all__ = ["kahan_add", "kahan_sum"]


def kahan_add(
    total: Float32[Array, "*shape"],
    compensation: Float32[Array, "*shape"],
    update: Float[Array, "*shape"],
    form: NumberFormat,
) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """(total, compensation) after `total + update`, every result rounded to nearest in `form`.

    `y = u − c`, `t = Q(w + y)`, `c = Q(Q(t − w) − y)` (Kahan 1965; 'Revisiting BFloat16 training', 2010.06192,
    algorithm 1); the sum that is meant is `total − compensation`.
    """
    y = form.quantize(update - compensation)
    found = form.quantize(total + y)
    return found, form.quantize(form.quantize(found - total) - y)


def kahan_sum(x: Float32[Array, "n *shape"], form: NumberFormat) -> Float32[Array, "*shape"]:
    """The sum over the first axis with every intermediate result in `form`."""

    def step(state: tuple[Array, Array], update: Array) -> tuple[tuple[Array, Array], None]:
        return kahan_add(*state, update, form), None

    zero = jnp.zeros(x.shape[1:], jnp.float32)
    (total, _), _ = jax.lax.scan(step, (zero, zero), x)
    return total
