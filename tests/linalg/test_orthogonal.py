"""Random orthogonal matrices: orthogonality, the Haar distribution's moments, and the two-stage product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import InputError
from qjax.incoherence.rotations import SignedHadamard, TwoStageOrthogonal
from qjax.linalg.orthogonal import balanced_factors, haar_orthogonal, two_stage, two_stage_transform


@pytest.mark.parametrize("n", [1, 2, 5])
def test_haar_matrices_are_orthogonal(n):
    q = np.asarray(haar_orthogonal(jax.random.key(0), 4, n), np.float64)
    np.testing.assert_allclose(q @ q.transpose(0, 2, 1), np.tile(np.eye(n), (4, 1, 1)), atol=2e-6)


def test_haar_matrix_is_the_qr_factor_of_its_gaussian():
    """Against LAPACK in float64, its signs fixed; 70 is not a whole number of panels."""
    key = jax.random.key(9)
    gaussian = np.asarray(jax.random.normal(key, (2, 70, 70)), np.float64)
    q, r = np.linalg.qr(gaussian)
    expected = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    got = np.asarray(haar_orthogonal(key, 2, 70), np.float64)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(got @ got.transpose(0, 2, 1), np.tile(np.eye(70), (2, 1, 1)), atol=2e-6)


def test_haar_moments():
    """E tr Q = 0, E (tr Q)² = 1, both determinants equally likely; without the sign fix E tr Q is far from 0."""
    q = np.asarray(haar_orthogonal(jax.random.key(1), 4000, 3), np.float64)
    trace = np.trace(q, axis1=1, axis2=2)
    assert abs(trace.mean()) < 4 / np.sqrt(4000)
    assert (trace**2).mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 4000))  # Var (tr Q)² = 2 to leading order
    assert abs((np.linalg.det(q) > 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (4096, (64, 64)),
        (576, (24, 24)),
        (1536, (32, 48)),
        (1, (1, 1)),
        (2, (2, 1)),
        (13, (13, 1)),
        (49, (7, 7)),
        (172, (86, 2)),
    ],
)
def test_balanced_factors(n, factors):
    assert balanced_factors(n) == factors


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("n", [1, 7, 12, 36])
def test_two_stage_is_orthogonal_and_inverts(n, single):
    factors = two_stage(jax.random.key(n), n, single)
    matrix = np.asarray(two_stage_transform(jnp.eye(n), factors), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=2e-6)
    np.testing.assert_allclose(two_stage_transform(jnp.eye(n), factors, transpose=True), matrix.T, atol=1e-6)


def test_single_mode_is_a_permuted_kronecker_product():
    inner, outer, before, after = two_stage(jax.random.key(3), 12, single=True)
    matrix = two_stage_transform(jnp.eye(12), (inner, outer, before, after))
    p_before, p_after = np.eye(12)[:, before], np.eye(12)[:, after]
    np.testing.assert_allclose(matrix, p_before @ np.kron(outer[0], inner[0]) @ p_after, atol=1e-6)


def test_butterfly_has_independent_blocks():
    """Without its permutations: first I_q ⊗ blocks on the fast axis, then one q×q factor for each place on it."""
    inner, outer, _, _ = two_stage(jax.random.key(4), 12)
    p, q = balanced_factors(12)
    assert inner.shape == (q, p, p)
    assert outer.shape == (p, q, q)
    assert np.abs(np.diff(np.asarray(inner), axis=0)).max() > 0.1
    first = np.zeros((12, 12))
    second = np.zeros((12, 12))
    for i in range(q):
        first[i * p : (i + 1) * p, i * p : (i + 1) * p] = inner[i]
    for j in range(p):
        second[j::p, j::p] = outer[j]
    plain = (inner, outer, jnp.arange(12), jnp.arange(12))
    np.testing.assert_allclose(two_stage_transform(jnp.eye(12), plain), first @ second, atol=1e-6)


def test_no_batched_lapack_call():
    """Two of them in one program can deadlock on two cores (see orthogonal.py)."""
    rotation = TwoStageOrthogonal.sample(jax.random.key(0), 36)
    assert "lapack" not in jax.jit(lambda r, x: r.apply_transpose(x)).lower(rotation, jnp.ones((2, 36))).as_text()


def test_factors_of_another_size():
    with pytest.raises(InputError, match="dimension of 13"):
        two_stage_transform(jnp.zeros((2, 13)), two_stage(jax.random.key(0), 12))


def test_stored_rotations_are_known_answers():
    """Stored artifacts hold a seed or sign bits only: these values must never change with the version of jax."""
    factors = TwoStageOrthogonal(jnp.asarray([1, 2], jnp.uint32), 12, False).factors()
    np.testing.assert_array_equal(factors[2], [10, 2, 1, 9, 0, 5, 3, 4, 7, 8, 11, 6])
    np.testing.assert_allclose(
        factors[0][0, 0], [-0.451954, -0.255973, -0.565298, 0.037715, -0.05587, 0.637267], atol=1e-5
    )
    signs = SignedHadamard(jnp.asarray([0x80000005, 0x2], jnp.uint32), 36, 36).signs()
    assert np.flatnonzero(np.asarray(signs) < 0).tolist() == [0, 2, 31, 33]


@pytest.mark.parametrize("size", [31, 32, 33, 576])
def test_signs_take_one_bit_each(size):
    rotation = SignedHadamard.sample(jax.random.key(0), size)
    assert rotation.words.shape == (-(-size // 32),)
    assert rotation.words.dtype == jnp.uint32
    assert set(np.unique(rotation.signs())) == {-1.0, 1.0}
    unused = 32 * rotation.words.size - size
    assert int(rotation.words[-1]) < 2 ** (32 - unused)


def test_signs_are_fair():
    signs = np.asarray(SignedHadamard.sample(jax.random.key(5), 20_000).signs())
    assert abs(signs.mean()) < 4 / np.sqrt(20_000)
    assert abs((signs[1:] * signs[:-1]).mean()) < 4 / np.sqrt(20_000)
