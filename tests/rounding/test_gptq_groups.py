"""GPTQ's group scales and activation order against a naive loop in the manner of the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, incoherence, rounding
from qjax.codebooks.scaling import ScaleRule, fit
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.matrix.quantized import QuantizedMatrix

M, N, GROUP = 16, 64, 16


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, N)) @ rng.standard_normal((N, N))
    return rng.standard_normal((M, N)) * 0.05, x.T @ x / 200


def naive(w, h, bits, order, group=GROUP):
    """Groups of the visiting order, fitted on the compensated weights when their first column is reached."""
    h = h / np.mean(np.diag(h)) + 0.01 * np.eye(N)
    perm = np.argsort(-np.diag(h), kind="stable") if order == "descending" else np.arange(N)
    w, upper = w[:, perm].copy(), np.linalg.cholesky(np.linalg.inv(h[np.ix_(perm, perm)])).T
    book, rule = codebooks.make("grid", bits), ScaleRule("minmax", "row")
    unit = fit(jnp.asarray(problem()[0]), book, ScaleRule("minmax", "group", group)).unit
    out = np.zeros_like(w)
    for i in range(N):
        if i % group == 0:
            fitted = fit(jnp.asarray(w[:, i : i + group]), book, rule, unit=unit)
            scale, zero = (np.asarray(v)[:, 0] for v in fitted.at(jnp.arange(1), jnp.float64))
        out[:, i] = (np.clip(np.floor(w[:, i] / scale + zero + 0.5), 0, 2**bits - 1) - zero) * scale
        w[:, i:] -= np.outer((w[:, i] - out[:, i]) / upper[i, i], upper[i, i:])
    return out[:, np.argsort(perm)]


@pytest.mark.parametrize("order", ["natural", "descending"])
@pytest.mark.parametrize("bits", [2, 4])
def test_dynamic_groups_equal_the_loop(order, bits):
    w, h = problem()
    rule = ScaleRule("minmax", "group", GROUP)
    book = codebooks.make("grid", bits)
    algorithm = dataclasses.replace(rounding.make("gptq", order=order), rule=rule)
    result = algorithm(jnp.asarray(w), Hessian(jnp.asarray(h)), book, scaling=fit(jnp.asarray(w), book, rule))
    np.testing.assert_allclose(result.values, naive(w, h, bits, order), atol=1e-12)
    assert (result.permutation is not None) == (order == "descending")


@pytest.mark.parametrize("group", [N, 2 * N])
@pytest.mark.parametrize("order", ["natural", "descending"])
def test_one_group_as_wide_as_the_matrix_equals_the_loop(order, group):
    w, h = problem()
    rule, book = ScaleRule("minmax", "group", group), codebooks.make("grid", 3)
    algorithm = dataclasses.replace(rounding.make("gptq", order=order), rule=rule)
    result = algorithm(jnp.asarray(w), Hessian(jnp.asarray(h)), book, scaling=fit(jnp.asarray(w), book, rule))
    np.testing.assert_allclose(result.values, naive(w, h, 3, order, group), atol=1e-12)
    assert result.permutation is None and result.scaling.relative.shape == (M, 1)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("order", ["natural", "descending"])
def test_the_stored_matrix_decodes_to_the_rounded_values(order, static):
    w, h = problem()
    w, h = w.astype(np.float32), h.astype(np.float32)
    rule, book = ScaleRule("minmax", "group", GROUP), codebooks.make("grid", 3)
    algorithm = dataclasses.replace(rounding.make("gptq", order=order, static_groups=static), rule=rule)
    result = algorithm(jnp.asarray(w), Hessian(jnp.asarray(h)), book, scaling=fit(jnp.asarray(w), book, rule))
    transform = incoherence.make("none").sample(jax.random.key(0), M, N)
    matrix = QuantizedMatrix(book.pack(result.codes), result.scaling, transform, book, result.permutation)
    np.testing.assert_array_equal(matrix.dequantize(), result.values)
    bits = 3 + (16 + 8) / GROUP + (16 / M if result.permutation is not None else 0)
    assert matrix.bits_per_weight == pytest.approx(bits + 32 / (M * N))


def test_a_group_that_does_not_divide_is_refused():
    w, h = problem()
    rule, book = ScaleRule("minmax", "group", 24), codebooks.make("grid", 3)
    algorithm = dataclasses.replace(rounding.make("gptq"), rule=rule)
    with pytest.raises(InputError, match="group_size is 24 and the matrix has 64 columns"):
        algorithm(jnp.asarray(w), Hessian(jnp.asarray(h)), book, scaling=fit(jnp.asarray(w), book, rule))
