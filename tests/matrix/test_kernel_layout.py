"""Matrices repacked for the kernels give the products of the matrices they were made from."""

import jax
import numpy as np
import pytest

from qjax import Hessian, codebooks, incoherence, quantize_matrix, rounding
from qjax.codebooks.scaling import ScaleRule
from qjax.matrix.kernel_layout import PackedLinear, obstacle, pack, pack_model
from qjax.matrix.quantized import QuantizedMatrix

# What is stored, not how it was found: nearest rounding compiles fastest.
CASES = {
    "half_integer": (("half_integer", 2, {}), "nearest", {}, None),
    "quip_grid rows": (("quip_grid", 3, {}), "nearest", {}, ScaleRule("rms", "row")),
    "grid groups": (("grid", 4, {}), "gptq", {}, ScaleRule("minmax", "group", 32)),
    "grid in activation order": (("grid", 4, {}), "gptq", {"order": "descending"}, None),
    "trellis": (("trellis", 2, {"L": 9, "code": "mul1"}), "nearest", {}, None),
    "hyb": (("trellis", 2, {"L": 9, "code": "hyb", "V": 2, "Q": 6}), "nearest", {}, None),
    "e8p": (("e8p", 2, {}), "nearest", {}, None),
    "e8p with 3 bits": (("e8p_rvq", 3, {}), "nearest", {}, None),
    "e8p with 4 bits": (("e8p_rvq", 4, {}), "nearest", {}, None),
}


def quantized(book, name, options, scale, shape=(48, 96)):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((400, shape[1])).astype(np.float32) * np.linspace(0.2, 3, shape[1], dtype=np.float32)
    matrix, _ = quantize_matrix(
        weight,
        Hessian((x.T @ x / 400).astype(np.float32)),
        codebook=codebooks.make(book[0], book[1], **book[2]),
        rounding=rounding.make(name, **options),
        incoherence=incoherence.make("hadamard"),
        scale=scale,
        key=jax.random.key(0),
    )
    return matrix


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 20])
def test_products_agree(case, batch):
    matrix = quantized(*CASES[case])
    packed = pack(matrix)
    assert obstacle(matrix) is None and isinstance(packed, PackedLinear)
    x = np.random.default_rng(1).standard_normal((batch, 96)).astype(np.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(jax.jit(QuantizedMatrix.dequantize)(matrix), np.float64).T
    found = jax.jit(lambda x, m: m.matmul(x))(x, packed)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_gains_are_applied():
    import dataclasses

    matrix = quantized(*CASES["half_integer"])
    rng = np.random.default_rng(2)
    a, b = rng.uniform(0.5, 2, 48).astype(np.float32), rng.uniform(0.5, 2, 96).astype(np.float32)
    tuned = dataclasses.replace(matrix, output_gain=a, input_gain=b)
    x = rng.standard_normal((1, 96)).astype(np.float32)
    expected = x @ np.asarray(jax.jit(QuantizedMatrix.dequantize)(tuned)).T
    found = jax.jit(lambda x, m: m.matmul(x))(x, pack(tuned))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["d4", "lloyd_max"])
def test_codebooks_without_a_layout_stay_as_they_are(name):
    matrix = quantized((name, 2, {}), "nearest", {}, None)
    assert obstacle(matrix) == f"codebook {name}"
    params = {"a": matrix, "b": np.zeros(3)}
    packed = pack_model(params)
    assert packed["a"] is matrix and packed["b"] is params["b"]


def test_groups_that_no_block_holds():
    matrix = quantized(("grid", 4, {}), "gptq", {}, ScaleRule("minmax", "group", 24))
    assert obstacle(matrix) == "groups of 24 columns" and pack(matrix) is matrix
