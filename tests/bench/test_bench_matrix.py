"""The matrix benchmark measures what the library does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.bench.matrix import Case, flops, gram_update, ldlq_sweep, lines, measure, parse_size
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.linalg.damping import damped_factor


def test_operation_counts():
    work = flops(Case(2, 3, tokens=5))
    assert work == {"matmul": 54, "gram": 90, "factor": 9, "ldlq_sweep": 18, "ldlq": 27, "gptq": 36}
    square = flops(Case(4096, 4096))
    assert square["ldlq_sweep"] == square["matmul"] / 2 and square["gram"] == square["matmul"]


def test_the_gram_update_loses_nothing_over_many_batches():
    rng = np.random.default_rng(0)
    update = jax.jit(gram_update)
    total = carry = np.zeros((6, 6), np.float32)
    exact = np.zeros((6, 6))
    plain = np.zeros((6, 6), np.float32)
    for _ in range(400):
        x = rng.standard_normal((8, 6)).astype(np.float32) + 3
        total, carry = update(total, carry, x)
        product = np.asarray(jnp.matmul(x.T, x, precision="highest"))
        exact += product
        plain += product
    error = lambda a: np.max(np.abs(np.asarray(a, np.float64) - exact) / exact)  # noqa: E731
    assert error(total) <= 2**-24 and error(plain) > 2**-23  # one rounding in all, against one per batch


def test_the_sweep_that_is_timed_is_the_one_of_ldlq():
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.standard_normal((12, 48)), jnp.float32)
    x = rng.standard_normal((64, 48)).astype(np.float32)
    h = jnp.asarray(x.T @ x / 64)
    book = codebooks.make("half_integer", 2)
    alone = jax.jit(lambda w, lower: ldlq_sweep(w, lower, book))(weight, damped_factor(h, 0.01, 1).lower)
    np.testing.assert_array_equal(alone, rounding.make("ldlq")(weight, Hessian(h), book, damping=0.01).codes)


def test_a_measurement_is_complete():
    case = Case(8, 24, tokens=64)
    result = measure(case, repeats=2, least_seconds=0.0)
    assert result["size"] == "8x24" and result["damping_sufficed"] is True
    assert list(result["steps"]) == list(flops(case))
    for name, step in result["steps"].items():
        assert step["repeats"] == 2 and step["flops"] == flops(case)[name]
        assert 0 < step["seconds_min"] <= step["seconds_median"] <= step["seconds_max"]
        assert step["gflops_per_second"] == pytest.approx(step["flops"] / step["seconds_median"] / 1e9)
        assert step["compile_seconds"] > 0 and step["temporary_bytes"] >= 0
    assert result["steps"]["matmul"]["ratio_to_matmul"] == 1.0
    headers, rows = lines([result])
    assert len(rows) == 6 and {len(row) for row in rows} == {len(headers)}


@pytest.mark.parametrize("text", ["3by4", "576", "0x4", "-2x3", "576x", "x", "4096x4096x2", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"is not a size; write rows x columns"):
        parse_size(text)


def test_sizes():
    assert parse_size("576x1536") == (576, 1536) and parse_size(" 2×3 ") == (2, 3)
