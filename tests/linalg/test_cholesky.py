"""The blocked Cholesky factor and triangular inverse against LAPACK in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.linalg.cholesky import cholesky, invert_lower


def definite(n, seed=0, damping=0.01):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n, n)) * np.exp(-np.arange(n) / 30)
    h = x.T @ x / len(x)
    return h / np.mean(np.diag(h)) + damping * np.eye(n)


@pytest.mark.parametrize(("n", "block"), [(1, 1), (7, 3), (24, 8), (40, 16), (33, 64)])
def test_any_block_gives_the_factor_and_the_inverse(n, block):
    h = definite(n)
    with jax.enable_x64(True):
        factor = np.asarray(cholesky(jnp.asarray(h), block))
        inverse = np.asarray(invert_lower(jnp.asarray(factor), block))
    np.testing.assert_allclose(factor, np.linalg.cholesky(h), rtol=0, atol=1e-13)
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(h)), rtol=1e-10, atol=1e-11)
    assert not np.triu(factor, 1).any() and not np.triu(inverse, 1).any()


@pytest.mark.parametrize("n", [96, 128, 300])
def test_float32_is_as_good_as_lapack(n):
    h = definite(n).astype(np.float32)
    residual = lambda c: np.max(np.abs(np.asarray(c, np.float64) @ np.asarray(c, np.float64).T - h))  # noqa: E731
    factor = cholesky(jnp.asarray(h))
    # The backward error bound of Cholesky in any order of summation is about (n + 1) units of rounding.
    assert residual(factor) <= (n + 1) * 2**-24 * np.max(np.diag(h))
    assert residual(factor) <= 2 * residual(np.linalg.cholesky(h)) + 2**-22
    identity = np.asarray(invert_lower(factor), np.float64) @ np.asarray(factor, np.float64)
    np.testing.assert_allclose(identity, np.eye(n), atol=2e-5)


def test_a_small_matrix_is_lapacks_factor_to_the_bit():
    h = jnp.asarray(definite(100).astype(np.float32))
    np.testing.assert_array_equal(cholesky(h), jax.jit(jnp.linalg.cholesky)(h))


@pytest.mark.parametrize("bad", [3, 20, 39])
def test_an_indefinite_matrix_gives_nan_from_its_block_on(bad):
    h = definite(40)
    h[bad, bad] = -1.0
    factor = np.asarray(cholesky(jnp.asarray(h.astype(np.float32)), 8))
    first = bad // 8 * 8
    assert np.isnan(factor[first:, first:][np.tril_indices(40 - first)]).any()
    assert np.isnan(factor[39, 39]) and np.isfinite(factor[:first, :first]).all()


def test_only_the_lower_triangle_of_a_factor_is_read():
    lower = np.tril(definite(20)).astype(np.float32)
    noise = np.triu(np.full((20, 20), np.nan, np.float32), 1)
    clean = np.asarray(invert_lower(jnp.asarray(lower), 20))
    np.testing.assert_array_equal(invert_lower(jnp.asarray(lower + noise), 20), clean)


@pytest.mark.parametrize("function", [cholesky, invert_lower])
def test_the_program_holds_one_panel_however_many_there_are(function):
    """Unrolled, the program of 8192 columns kept half a gigabyte; only products of exact sizes may be repeated."""

    def others(n):
        lines = function.lower(jax.ShapeDtypeStruct((n, n), jnp.float32), 16).as_text().splitlines()
        return sum("stablehlo.while" in line or "custom_call" in line for line in lines)

    assert others(16 * 40) == others(16 * 4) > 0
