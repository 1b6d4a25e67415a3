"""Damped factorisation: what it factorises, when it escalates, what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import InputError, NumericsError
from qjax.linalg.damping import ESCALATION, check_hessian, damped_factor, unit_mean_diagonal
from qjax.linalg.ldl import block_ldl_host


def second_moment(n, tokens, seed=0, outlier=1.0):
    x = np.random.default_rng(seed).standard_normal((tokens, n))
    x[:, 0] *= outlier
    return x.T @ x / tokens


def product(factor):
    lower = np.asarray(factor.lower, np.float64)
    return lower @ scipy.linalg.block_diag(*np.asarray(factor.diagonal, np.float64)) @ lower.T


@pytest.mark.parametrize("block", [1, 8])
def test_factor_of_the_normalised_damped_hessian(block):
    h = 37.0 * second_moment(32, 100)
    factor = damped_factor(jnp.asarray(h, jnp.float32), 0.01, block)
    target = h / np.diag(h).mean() + 0.01 * np.eye(32)
    lower, diagonal = block_ldl_host(target, block)
    np.testing.assert_allclose(factor.lower, lower, atol=1e-4)
    np.testing.assert_allclose(factor.diagonal, diagonal, rtol=1e-3, atol=1e-5)
    assert bool(factor.ok)
    assert float(factor.damping) == pytest.approx(0.01)
    assert int(factor.dead) == 0
    assert float(factor.min_pivot) == pytest.approx(np.diag(np.linalg.cholesky(target)).min() ** 2, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_scale_of_the_hessian_has_no_meaning(exponent, seed):
    """By a power of two even the bits agree."""
    h = jnp.asarray(second_moment(12, 40, seed), jnp.float32)
    plain, scaled = damped_factor(h, 0.01, 4), damped_factor(h * jnp.float32(2.0**exponent), 0.01, 4)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rank_deficient_hessian_needs_no_escalation():
    factor = damped_factor(jnp.asarray(second_moment(64, 5), jnp.float32), 0.01)
    assert bool(factor.ok)
    assert float(factor.damping) == pytest.approx(0.01)
    assert float(factor.min_pivot) >= 0.005


def test_damping_is_escalated_until_the_factor_is_sound():
    """Eigenvalue −0.1 against a mean diagonal of 1: 0.01·10^(k/2) first exceeds 0.1 at k = 3 (0.316)."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    values = np.array([-0.1, *np.full(7, 8.1 / 7)])
    h = q @ np.diag(values) @ q.T
    factor = damped_factor(jnp.asarray(h, jnp.float32), 0.01)
    assert bool(factor.ok)
    assert float(factor.damping) == pytest.approx(0.01 * ESCALATION**3, rel=1e-5)
    np.testing.assert_allclose(product(factor), h + float(factor.damping) * np.eye(8), atol=1e-5)


def test_zero_damping_starts_from_a_small_one():
    """A rank-one H is singular, so nothing added fails and the first decade above float32's rounding works."""
    h = jnp.ones((16, 16), jnp.float32)
    factor = damped_factor(h, 0.0)
    assert bool(factor.ok)
    assert 1e-6 <= float(factor.damping) <= 1e-3
    sound = damped_factor(jnp.asarray(second_moment(16, 200), jnp.float32), 0.0)
    assert bool(sound.ok)
    assert float(sound.damping) == 0.0


def test_the_number_of_retries_is_a_cap():
    h = jnp.diag(jnp.asarray([1.4, 1.4, 1.6, -0.4], jnp.float32))  # mean 1; sound from δ = 0.8: 0.01·10^(k/2) at k = 4
    assert bool(damped_factor(h, 0.01, 1, retries=4).ok)
    assert not bool(damped_factor(h, 0.01, 1, retries=3).ok)
    assert not bool(damped_factor(h, 0.01, 1, retries=0).ok)
    assert not bool(damped_factor(h, 0.01, 1, retries=2).ok)
    assert float(damped_factor(h, 0.01, 1, retries=2).damping) == pytest.approx(0.1, rel=1e-5)


def test_a_lost_pivot_is_not_sound():
    """Rounding at the size of the damping: the factor is finite, but its pivots are noise, so more is added."""
    h = jnp.asarray(second_moment(256, 3, outlier=1e4), jnp.float32)
    factor = damped_factor(h, 1e-7)
    assert bool(factor.ok)
    assert float(factor.damping) > 1e-7
    assert float(factor.min_pivot) >= float(factor.damping) / 2


@pytest.mark.parametrize("block", [1, 4])
def test_dead_channels_carry_no_feedback(block):
    h = second_moment(16, 60)
    dead = [2, 3, 9]
    h[dead, :] = h[:, dead] = 0
    factor = damped_factor(jnp.asarray(h, jnp.float32), 0.01, block)
    live = np.setdiff1d(np.arange(16), dead)
    assert int(factor.dead) == 3
    assert bool(factor.ok)
    off = np.asarray(factor.lower) - np.eye(16)
    np.testing.assert_array_equal(off[dead, :], 0)
    np.testing.assert_array_equal(off[:, dead], 0)
    matrix, count = unit_mean_diagonal(jnp.asarray(h, jnp.float32))
    assert int(count) == 3
    np.testing.assert_array_equal(np.diag(matrix)[dead], 1)
    assert np.diag(matrix)[live].mean() == pytest.approx(1, rel=1e-6)


def test_no_calibration_gives_the_identity():
    factor = damped_factor(jnp.zeros((8, 8), jnp.float32), 0.01, 4)
    assert bool(factor.ok)
    assert int(factor.dead) == 8
    np.testing.assert_array_equal(factor.lower, np.eye(8))
    np.testing.assert_allclose(factor.diagonal, np.tile(1.01 * np.eye(4), (2, 1, 1)), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_values_that_are_not_finite_are_reported_without_retries(value, place):
    h = np.eye(8, dtype=np.float32)
    h[place] = h[place[::-1]] = value
    factor = damped_factor(jnp.asarray(h), 0.01)
    assert not bool(factor.ok)
    assert float(factor.damping) == pytest.approx(0.01)


def test_a_negative_mean_diagonal_is_not_factored():
    assert not bool(damped_factor(-jnp.eye(4), 0.01).ok)


def test_a_large_hessian_does_not_overflow():
    factor = damped_factor(jnp.asarray(second_moment(64, 200) * 1e37, jnp.float32), 0.01)
    assert bool(factor.ok)


def test_batches_under_vmap_escalate_on_their_own():
    good, bad = second_moment(8, 40), np.eye(8)
    bad[0, 0] = -0.05
    factor = jax.vmap(lambda h: damped_factor(h, 0.01, 4))(jnp.asarray(np.stack([good, bad + 0.01]), jnp.float32))
    assert factor.damping[0] == pytest.approx(0.01)
    np.testing.assert_allclose(factor.lower[0], damped_factor(jnp.asarray(good, jnp.float32), 0.01, 4).lower, atol=1e-6)


def test_the_only_lapack_call_is_one_cholesky():
    """Batched LAPACK calls can deadlock on two cores (see orthogonal.py)."""
    text = damped_factor.lower(jnp.eye(16), 0.01, 4).as_text()
    assert text.count("@lapack_") <= 1


def test_block_must_divide():
    with pytest.raises(InputError, match="block 3 does not divide"):
        damped_factor(jnp.eye(8), 0.01, 3)


def test_a_good_hessian_passes_the_check():
    h = second_moment(40, 10).astype(np.float32)
    h[5, :] = h[:, 5] = 0
    check_hessian(h, "layer")
    check_hessian(h + 1e-6 * np.triu(np.ones_like(h)), "layer")
    check_hessian(np.zeros((4, 4)), "layer")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda h: h[:3], InputError, r"shape \[3, 8\]"),
        (lambda h: h[0], InputError, r"shape \[8\]"),
        (lambda h: h[:0, :0], InputError, r"shape \[0, 0\]"),
        (lambda h: h.astype(np.int32), InputError, "dtype int32"),
        (lambda h: np.where(np.arange(64).reshape(8, 8) == 19, np.nan, h), NumericsError, r"first at \[2, 3\]: nan"),
        (lambda h: np.where(np.eye(8) == 1, np.inf, h), NumericsError, r"first at \[0, 0\]: inf"),
        (lambda h: h - 3 * np.diag(np.eye(8)[4]), NumericsError, r"negative.*\[4, 4\]"),
        (lambda h: h + np.diag(np.ones(7), 1), NumericsError, "not symmetric.*allowed is 0.0001"),
    ],
)
def test_a_damaged_hessian_is_named(damage, error, message):
    with pytest.raises(error, match=f"model.layers.3.mlp: the Hessian.*{message}"):
        check_hessian(damage(np.eye(8)), "model.layers.3.mlp")


def test_symmetry_is_checked_in_the_last_rows_too():
    h = np.eye(1100, dtype=np.float32)
    h[1090, 4] = 0.5
    with pytest.raises(NumericsError, match=r"\[4, 1090\]|\[1090, 4\]"):
        check_hessian(h, "layer")
