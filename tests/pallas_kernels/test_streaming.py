"""Products on a CPU that decode in registers, against the reference that decodes first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.cases import packed
from pallas_kernels.dequant_matmul import dequantize, from_codes, matmul, reference, repack_trellis, streaming
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.dequant_matmul.trellis import CODES


def close(found, x, weight):
    dense = np.asarray(jax.jit(dequantize)(weight), np.float64)
    expected = np.asarray(x, np.float64) @ dense
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(dense)  # what a float32 sum of these terms may lose
    assert found.shape == expected.shape
    assert np.all(np.abs(np.asarray(found, np.float64) - expected) <= 64 * 2.0**-24 * scale)


@pytest.mark.parametrize(
    ("bits", "batch", "out", "inner", "group"),
    [
        (1, 1, 40, 600, None),
        (2, 3, 128, 512, None),
        (3, 1, 130, 1100, 64),
        (4, 8, 64, 1040, 1024),
        (5, 1, 16, 17, None),
        (8, 2, 32, 528, 512),
        (4, 1, 48, 1024, 16),
    ],
)
def test_scalar_grids(bits, batch, out, inner, group):
    rng = np.random.default_rng(bits)
    groups = 1 if group is None else -(-inner // group)
    codes = rng.integers(0, 2**bits, (out, inner)).astype(np.uint8)
    scale, offset = rng.uniform(0.5, 1.5, (out, groups)), rng.standard_normal((out, groups))
    make = jax.jit(lambda c, s, o: from_codes(c, bits, s, o, group))
    weight = make(codes, scale.astype(np.float32), offset.astype(np.float32))
    x = rng.standard_normal((batch, inner)).astype(np.float32)
    assert streaming.suits(batch, x.dtype, weight)
    close(jax.jit(matmul)(x, weight), x, weight)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("bits", "L", "batch", "out", "inner"), [(1, 16, 1, 16, 528), (2, 12, 2, 144, 592), (4, 9, 1, 32, 64)]
)
def test_trellises(code, bits, L, batch, out, inner):
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, out * inner * bits // 32, dtype=np.uint32)
    scale = rng.uniform(0.5, 1.5, (out, 1)).astype(np.float32)
    weight = jax.jit(lambda w, s: repack_trellis(w, bits, (out, inner), s, code, L))(words, scale)
    x = rng.standard_normal((batch, inner)).astype(np.float32)
    close(jax.jit(matmul)(x, weight), x, weight)


@pytest.mark.parametrize(("batch", "out", "inner"), [(1, 144, 1096), (3, 16, 520)])
def test_lattices(batch, out, inner):
    weight = packed(Spec(2, batch, out, inner, None, "e8p"), jax.random.key(0))
    scale = np.random.default_rng(0).uniform(0.5, 1.5, weight.scale.shape).astype(np.float32)
    weight = dataclasses.replace(weight, scale=jnp.asarray(scale))
    x = np.random.default_rng(1).standard_normal((batch, inner)).astype(np.float32)
    assert streaming.suits(batch, x.dtype, weight)
    close(jax.jit(matmul)(x, weight), x, weight)


def test_it_runs_for_few_rows_of_float32_only(monkeypatch):
    rng = np.random.default_rng(0)
    one = jnp.ones((1, 1))
    weight = jax.jit(lambda c: from_codes(c, 2, one, one))(rng.integers(0, 4, (16, 512)).astype(np.uint8))
    used = []
    for module in (streaming, reference):
        plain = module.matmul
        monkeypatch.setattr(
            module, "matmul", lambda x, w, p=plain, m=module: used.append(m.__name__.split(".")[-1]) or p(x, w)
        )
    for batch, dtype in ((1, jnp.float32), (9, jnp.float32), (1, jnp.bfloat16)):
        jax.block_until_ready(jax.jit(matmul)(jnp.ones((batch, 512), dtype), weight))
    assert used == ["streaming", "reference", "reference"]


def test_gradients_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    one = jnp.ones((1, 1))
    weight = jax.jit(lambda c: from_codes(c, 3, one, one))(rng.integers(0, 8, (16, 40)).astype(np.uint8))
    x = rng.standard_normal((1, 40)).astype(np.float32)
    found = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(matmul(x, weight)))))(x)
    dense = np.asarray(jax.jit(dequantize)(weight), np.float64)
    np.testing.assert_allclose(found, 2 * x @ dense @ dense.T, rtol=1e-4)
