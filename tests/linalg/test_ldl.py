"""Block LDL against its definition, brute force and LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qjax.errors import InputError, NumericsError
from qjax.linalg import ldl
from qjax.linalg.ldl import block_ldl, block_ldl_host, block_udu, factor_blocks, invert_blocks, times_blocks


def positive(n, seed=0, samples=None):
    x = np.random.default_rng(seed).standard_normal((samples or 2 * n, n)) * np.linspace(0.3, 3, n)
    return x.T @ x / len(x) + 1e-3 * np.eye(n)


def block_diagonal(blocks):
    return scipy.linalg.block_diag(*np.asarray(blocks, np.float64))


def same_block(n, block):
    index = np.arange(n) // block
    return index[:, None] == index[None, :]


def eliminated(h, block):
    """Brute force: block Gaussian elimination with explicit inverses."""
    h, n = h.copy(), len(h)
    lower, diagonal = np.eye(n), []
    for start in range(0, n, block):
        own, below = slice(start, start + block), slice(start + block, n)
        pivot = h[own, own].copy()
        diagonal.append(pivot)
        lower[below, own] = h[below, own] @ np.linalg.inv(pivot)
        h[below, below] -= lower[below, own] @ pivot @ lower[below, own].T
    return lower, np.array(diagonal)


@pytest.mark.parametrize("block", [1, 2, 3, 8, 24, 48])
def test_host_factor_is_block_elimination(block):
    h = positive(48)
    lower, diagonal = block_ldl_host(h, block)
    expected_lower, expected_diagonal = eliminated(h, block)
    np.testing.assert_allclose(lower, expected_lower, atol=1e-11)
    np.testing.assert_allclose(diagonal, expected_diagonal, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lower @ block_diagonal(diagonal) @ lower.T, h, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(lower[same_block(48, block)], np.eye(48)[same_block(48, block)])
    np.testing.assert_array_equal(np.triu(lower, 1), 0)


@pytest.mark.parametrize("block", [1, 8, 16, 64])
def test_device_factor_is_the_host_factor(block):
    h = positive(64)
    lower, diagonal = block_ldl(jnp.asarray(h, jnp.float32), block)
    expected_lower, expected_diagonal = block_ldl_host(h, block)
    assert lower.dtype == jnp.float32
    np.testing.assert_allclose(lower, expected_lower, atol=2e-4)
    np.testing.assert_allclose(diagonal, expected_diagonal, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(lower)[same_block(64, block)], np.eye(64)[same_block(64, block)])


@pytest.mark.parametrize("block", [1, 8, 64])
def test_device_factor_in_float64(block):
    with jax.enable_x64(True):
        h = positive(64)
        for got, expected in zip(block_ldl(jnp.asarray(h), block), block_ldl_host(h, block), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-11)


def test_scalar_factor_agrees_with_lapack():
    h = positive(20)
    lower, diagonal, _ = scipy.linalg.ldl(h)  # positive definite: scipy's pivots stay in place here
    ours, pivots = block_ldl_host(h, 1)
    np.testing.assert_allclose(ours @ np.diag(pivots.ravel()) @ ours.T, lower @ diagonal @ lower.T, atol=1e-12)


@pytest.mark.parametrize("block", [1, 8])
def test_upper_factor_reconstructs(block):
    with jax.enable_x64(True):
        h = positive(48)
        upper, diagonal = (np.asarray(a) for a in block_udu(jnp.asarray(h), block))
        np.testing.assert_allclose(upper @ block_diagonal(diagonal) @ upper.T, h, atol=1e-12)
        np.testing.assert_array_equal(np.tril(upper, -1), 0)
        np.testing.assert_array_equal(upper[same_block(48, block)], np.eye(48)[same_block(48, block)])


def test_scalar_upper_factor_is_gptqs():
    """GPTQ's U (upper Cholesky of H⁻¹) with rows divided by their diagonal is the inverse of the unit upper factor."""
    with jax.enable_x64(True):
        h = positive(16)
        upper, _ = block_udu(jnp.asarray(h), 1)
        gptq = np.linalg.cholesky(np.linalg.inv(h)).T
        np.testing.assert_allclose(np.linalg.inv(np.asarray(upper)), gptq / np.diag(gptq)[:, None], atol=1e-10)


def test_trace_identity_of_feedback():
    """tr(E H Eᵀ) = tr(η D ηᵀ) with η = E L."""
    h = positive(32)
    e = np.random.default_rng(1).standard_normal((5, 32))
    lower, diagonal = block_ldl_host(h, 8)
    eta = e @ lower
    assert np.trace(eta @ block_diagonal(diagonal) @ eta.T) == pytest.approx(np.trace(e @ h @ e.T), rel=1e-12)


def test_batches_under_vmap():
    h = jnp.asarray(np.stack([positive(16, seed) for seed in range(3)]), jnp.float32)
    lower, diagonal = jax.vmap(lambda a: block_ldl(a, 4))(h)
    for i in range(3):
        expected = block_ldl(h[i], 4)
        np.testing.assert_allclose(lower[i], expected[0], atol=1e-5)
        np.testing.assert_allclose(diagonal[i], expected[1], atol=1e-5)


@pytest.mark.parametrize("block", [0, 5, 96, -1])
@pytest.mark.parametrize("factorise", [block_ldl, block_udu])
def test_block_that_does_not_divide(factorise, block):
    with pytest.raises(InputError, match=f"block {block} does not divide the 48"):
        factorise(jnp.eye(48), block)
    with pytest.raises(InputError, match=f"block {block} does not divide the 48"):
        block_ldl_host(np.eye(48), block)


def test_host_factor_of_an_indefinite_matrix():
    with pytest.raises(NumericsError, match=r"4 columns is not positive definite.*damping"):
        block_ldl_host(np.diag([1.0, 2.0, -1.0, 1.0]), 2)


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_small_blocks_are_factored_and_inverted_without_lapack(block):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((7, block, 2 * block)).astype(np.float32)
    matrices = x @ x.transpose(0, 2, 1) + np.eye(block, dtype=np.float32)
    factor = factor_blocks(jnp.asarray(matrices))
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrices), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(invert_blocks(factor) @ factor, np.tile(np.eye(block), (7, 1, 1)), atol=2e-5)
    assert "custom_call" not in jax.jit(factor_blocks).lower(jnp.asarray(matrices)).as_text()
    assert np.isnan(np.asarray(factor_blocks(-jnp.asarray(matrices)))).any()


def test_products_with_blocks_in_place_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    matrix, blocks = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 24), (6, 4, 4)))
    expected = np.asarray(matrix, np.float64) @ block_diagonal(blocks)
    shifted = lambda part, start: part + start.astype(part.dtype)  # noqa: E731
    for columns in (4, 8, 24):
        monkeypatch.setattr(ldl, "_COLUMNS", columns)
        found = times_blocks(jnp.asarray(matrix), jnp.asarray(blocks), shifted)
        np.testing.assert_allclose(found, expected + np.arange(24) // columns * columns, rtol=0, atol=1e-5)
