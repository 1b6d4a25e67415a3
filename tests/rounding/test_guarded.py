"""QuIP's Algorithm 5: its convex problem against independent solutions, and the counter-example that it is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.rounding.guarded import bounded_noise


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def correlated(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(-np.arange(n) / (n / 4))[:, None])
    h = x.T @ x / len(x)
    return h / np.mean(np.diag(h)) + 0.01 * np.eye(n)


def objective(z, h):
    mix = np.eye(len(h)) + np.asarray(z)
    return np.trace(mix @ h @ mix.T)


def projected_gradient(h, bound, steps=20_000):
    """The same convex problem by another method."""
    z, rate = np.zeros_like(h), 0.5 / np.linalg.eigvalsh(h)[-1]
    for _ in range(steps):
        z = np.tril(z - rate * 2 * (np.eye(len(h)) + z) @ h, -1)
        z = z * np.minimum(1, bound / np.maximum(np.linalg.norm(z, axis=0), 1e-300))
    return z


@pytest.mark.parametrize("bound", [0.3, 1.0])
def test_admm_solves_the_convex_problem(float64, bound):
    h = correlated(10)
    z = np.asarray(bounded_noise(jnp.asarray(h), bound, iterations=3000))
    other = projected_gradient(h, bound)
    np.testing.assert_array_equal(z, np.tril(z, -1))
    assert np.max(np.linalg.norm(z, axis=0)) <= bound * (1 + 1e-12)
    assert np.max(np.linalg.norm(other, axis=0)) > bound * (1 - 1e-9)  # the bound matters here
    assert objective(z, h) == pytest.approx(objective(other, h), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 10, 100])
def test_any_number_of_iterations_is_feasible(iterations):
    h = correlated(40).astype(np.float32)
    z = np.asarray(bounded_noise(jnp.asarray(h), 1.0, iterations=iterations))
    np.testing.assert_array_equal(z, np.tril(z, -1))
    assert np.max(np.linalg.norm(z, axis=0)) <= 1 + 1e-5


def test_the_published_settings_are_close_to_the_optimum(float64):
    h = correlated(40)
    z, best = (bounded_noise(jnp.asarray(h), 1.0, iterations=k) for k in (100, 1000))
    assert objective(z, h) < 0.9 * np.trace(h)  # Z = 0
    assert objective(z, h) == pytest.approx(objective(best, h), rel=1e-3)


def test_without_an_active_bound_it_is_ldl(float64):
    h = correlated(24)
    factor = np.linalg.cholesky(h)
    lower = factor / np.diag(factor)
    z = bounded_noise(jnp.asarray(h), 1e3, iterations=400)
    np.testing.assert_allclose(np.eye(24) + np.asarray(z), np.linalg.inv(lower), atol=1e-6)
    assert objective(z, h) == pytest.approx(np.sum(np.square(np.diag(factor))), rel=1e-9)


def counter_example(n, c=0.01, rows=16):
    """QuIP's H = 11ᵀ + I with a small perturbation and weights near ½ (2307.13304, appendix), from right to left."""
    h = np.ones((n, n)) + np.eye(n)
    h[-1, -1] = 1
    h[0, 1:-1] += 2 * c
    h[1:-1, 0] += 2 * c
    h[0, -1] += c
    h[-1, 0] += c
    h[0, 0] += 4 * c + n * c**2
    w = np.full((rows, n), 0.499) + 0.002 * (np.arange(n) % 2)
    return w[:, ::-1], h[::-1, ::-1]


@functools.cache
def losses(n):
    w, h = counter_example(n)
    book = codebooks.make("grid", 2)

    def of(name, **options):
        method = rounding.make(name, **options)
        error = w - method(jnp.asarray(w), Hessian(jnp.asarray(h)), book, damping=0.0, key=jax.random.key(3)).values
        return float(np.sum(error @ h * error))

    return {
        "nearest": of("nearest"),
        "ldlq": of("ldlq"),
        "guarded": of("ldlq_guarded"),
        "guarded nearest": of("ldlq_guarded", stochastic=False),
    }


@pytest.mark.parametrize(("name", "most"), [("guarded", 1.1), ("guarded nearest", 1.01)])
def test_on_the_finite_grid_ldlq_fails_and_the_guarded_does_not(float64, name, most):
    small, large = losses(24), losses(96)
    assert large["ldlq"] > 20 * large["nearest"]
    assert large["ldlq"] > 10 * small["ldlq"]  # quadratic in n
    assert large[name] < most * large["nearest"]


def test_a_large_slack_gives_plain_ldlq(float64):
    rng = np.random.default_rng(1)
    w, hessian, book = (
        jnp.asarray(rng.standard_normal((20, 24))),
        Hessian(jnp.asarray(correlated(24))),
        codebooks.make("lloyd_max", 2),
    )
    plain = rounding.make("ldlq")(w, hessian, book)
    guarded = rounding.make("ldlq_guarded", slack=1e6, iterations=400, stochastic=False)(w, hessian, book)
    np.testing.assert_array_equal(guarded.values, plain.values)


def test_the_sweep_is_the_fixed_point_of_the_published_iteration(float64):
    """`ŵ ← clamp(⌊ŵ + (w − ŵ)L + ½⌋)`, iterated from zero, ends in the result of one sweep."""
    rng = np.random.default_rng(2)
    w, h = rng.uniform(0, 3, (12, 20)), correlated(20)
    method = rounding.make("ldlq_guarded", stochastic=False)
    swept = method(jnp.asarray(w), Hessian(jnp.asarray(h)), codebooks.make("grid", 2), damping=0.0).values
    scaled = h / np.mean(np.diag(h))
    lower = np.linalg.inv(np.eye(20) + np.asarray(bounded_noise(jnp.asarray(scaled))))
    values = np.zeros_like(w)
    for _ in range(20):
        values = np.clip(np.floor(values + (w - values) @ lower + 0.5), 0, 3)
    np.testing.assert_array_equal(swept, values)


def test_bad_options_are_refused():
    problem = jnp.zeros((8, 8)), Hessian(jnp.eye(8))
    for option, value in (("slack", -1.0), ("iterations", 0), ("rho", 0.0)):
        with pytest.raises(InputError, match=f"rounding.{option} is {value}"):
            rounding.make("ldlq_guarded", **{option: value})
    with pytest.raises(InputError, match=r"\(1, 8\); use rounding=ldlq"):
        rounding.make("ldlq_guarded")(*problem, codebooks.make("e8p", 2), key=jax.random.key(0))
    with pytest.raises(InputError, match="needs key"):
        rounding.make("ldlq_guarded")(*problem, codebooks.make("grid", 2))


def test_the_spec_makes_the_same_algorithm():
    method = rounding.make("ldlq_guarded", slack=0.5)
    assert rounding.make(**method.spec()) == method
