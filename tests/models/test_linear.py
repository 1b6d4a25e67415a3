"""The product of a linear in bfloat16 and its derivatives, against float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.linear import linear


def test_a_bfloat16_product_adds_up_in_float32_in_both_directions():
    rng = np.random.default_rng(0)
    x, weight, weights = (rng.normal(size=shape) for shape in ((2, 5, 256), (192, 256), (2, 5, 192)))
    x, weight = (jnp.asarray(value, jnp.bfloat16) for value in (x, weight))

    def loss(x, weight):
        return jnp.sum(linear(x, weight).astype(jnp.float32) * weights.astype(np.float32))

    y, gradients = linear(x, weight), jax.grad(loss, argnums=(0, 1))(x, weight)
    x64, weight64 = (np.asarray(value.astype(jnp.float32), np.float64) for value in (x, weight))
    g64 = np.asarray(jnp.asarray(weights, jnp.bfloat16).astype(jnp.float32), np.float64)  # the cotangent is rounded too
    expected = (x64 @ weight64.T, g64 @ weight64, np.einsum("bto,bti->oi", g64, x64))
    for found, exact in zip((y, *gradients), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        # One rounding of the result, 2^-9 of it, beside float32's: sums in bfloat16 would be off by far more.
        found = np.asarray(found.astype(jnp.float32))
        np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-4)
