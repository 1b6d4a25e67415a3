"""The exact relations between roundings (algorithms.md 3.1), in float64, against naive numpy loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.hessian import Hessian
from qjax.linalg.damping import damped_factor
from qjax.rounding.gptq import inverse_factor
from qjax.rounding.losses import quadratic
from qjax.rounding.sweep import widths

M, N = 24, 96


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem(seed=0, m=M, n=N):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 20))
    return rng.standard_normal((m, n)), x.T @ x / len(x)


def damped(h, damping=0.01):
    h = h / np.mean(np.diag(h))
    return h + damping * np.eye(len(h))


def half_integer(x):
    return np.clip(np.floor(x + 2), 0, 3) - 1.5


def naive_ldlq(w, h):
    factor = np.linalg.cholesky(damped(h))
    lower = factor / np.diag(factor)
    out = np.zeros_like(w)
    for k in reversed(range(w.shape[1])):
        out[:, k] = half_integer(w[:, k] + (w[:, k + 1 :] - out[:, k + 1 :]) @ lower[k + 1 :, k])
    return out


def naive_gptq(w, h):
    upper = np.linalg.cholesky(np.linalg.inv(damped(h))).T
    w, out = w.copy(), np.zeros_like(w)
    for i in range(w.shape[1]):
        out[:, i] = half_integer(w[:, i])
        w[:, i:] -= np.outer((w[:, i] - out[:, i]) / upper[i, i], upper[i, i:])
    return out


def run(name, w, h, bits=2, **options):
    return rounding.make(name, **options)(jnp.asarray(w), Hessian(jnp.asarray(h)), codebooks.make("half_integer", bits))


@pytest.mark.parametrize("seed", range(3))
def test_ldlq_and_gptq_equal_the_textbook_loops(seed):
    w, h = problem(seed)
    np.testing.assert_array_equal(run("ldlq", w, h).values, naive_ldlq(w, h))
    np.testing.assert_array_equal(run("gptq", w, h).values, naive_gptq(w, h))


def test_gptq_is_ldlq_with_the_columns_reversed():
    w, h = problem(4)
    reverse = run("ldlq", w[:, ::-1], h[::-1, ::-1]).values[:, ::-1]
    np.testing.assert_array_equal(run("gptq", w, h).values, reverse)


def test_activation_order_and_ascending_order_are_the_same_reversed():
    w, h = problem(5)
    np.testing.assert_array_equal(
        run("gptq", w, h, order="descending").values, run("ldlq", w, h, order="ascending").values
    )


def test_residual_bounds_and_loss_identity():
    """η = E L lies in ±½ on an unbounded grid and tr(E H Eᵀ) = tr(η D ηᵀ)."""
    w, h = problem(6)
    rounded = run("ldlq", w, h, bits=8)  # ±127.5: no clamping on this problem
    error = w - np.asarray(rounded.values)
    factor = damped_factor(jnp.asarray(h), 0.01, 1)
    residual = error @ np.asarray(factor.lower)
    assert np.max(np.abs(residual)) <= 0.5 + 1e-9
    loss = float(quadratic(jnp.asarray(error), Hessian(jnp.asarray(damped(h)))))
    assert loss == pytest.approx(np.sum(np.square(residual) @ np.asarray(factor.diagonal).ravel()), rel=1e-10)


def test_mean_loss_is_m_over_12_times_the_trace_of_d():
    """Nearest LDLQ: (m/12) tr D; independent nearest rounding: (m/12) tr H (QuIP, Theorem 1 and Lemma 2)."""
    w, h = problem(7, m=4000)
    w = w * 9  # many steps of the grid, so that residuals are uniform
    target = Hessian(jnp.asarray(damped(h)))
    factor = damped_factor(jnp.asarray(h), 0.01, 1)
    for name, trace in (("ldlq", np.sum(np.asarray(factor.diagonal))), ("nearest", N * 1.01)):
        loss = float(quadratic(jnp.asarray(w) - run(name, w, h, bits=8).values, target))
        assert loss == pytest.approx(4000 / 12 * trace, rel=0.02)


@pytest.mark.parametrize("block", [1, 2, 8, 16, 32])
def test_block_ldlq_equals_the_block_recursion(block):
    w, h = problem(8)
    factor = np.linalg.cholesky(damped(h))
    out = np.zeros_like(w)
    for start in reversed(range(0, N, block)):
        b = slice(start, start + block)
        lower = factor[:, b] @ np.linalg.inv(factor[b, b])
        after = slice(start + block, N)
        out[:, b] = half_integer(w[:, b] + (w[:, after] - out[:, after]) @ lower[after])
    np.testing.assert_array_equal(run("ldlq", w, h, block=block).values, out)


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, h = problem(9)
    upper, damping, ok = inverse_factor(jnp.asarray(h), 0.01)
    assert bool(ok) and float(damping) == pytest.approx(0.01)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped(h)), rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)


@pytest.mark.parametrize("n", [96, 97, 130, 640, 1152])
def test_lazy_updates_change_nothing(n):
    """Unrolled segments, buffers and sub-blocks give the codes of the plain recursion, whatever divides n."""
    w, h = problem(10, m=4, n=n)
    np.testing.assert_array_equal(run("ldlq", w, h).values, naive_ldlq(w, h))
    np.testing.assert_array_equal(run("gptq", w, h).values, naive_gptq(w, h))


@pytest.mark.parametrize(
    ("columns", "block", "group"),
    [(576, 1, None), (4096, 8, None), (176, 16, None), (97, 1, None), (4096, 1, 32), (576, 1, 64)],
)
def test_widths_nest(columns, block, group):
    chain = (columns, *widths(columns, block, group))
    assert chain[-1] == block and (group is None or group in chain)
    assert all(outer % inner == 0 for outer, inner in itertools.pairwise(chain))
