"""The Hadamard kernels against qjax.linalg, and every rung of the ladder without a device."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels.hadamard import hadamard, pallas_gpu, pallas_tpu, reference
from pallas_kernels.hadamard.specs import BENCHES, TESTS, Spec
from qjax.linalg.hadamard import block_hadamard_transform

KERNELS = {"gpu": pallas_gpu.hadamard, "tpu": pallas_tpu.hadamard}
DTYPES = (jnp.float32, jnp.bfloat16)
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def inputs(spec, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((spec.rows, spec.n)), dtype)


def check(found, x, block, dtype):
    expected = block_hadamard_transform(x.astype(jnp.float32), block)
    assert found.dtype == dtype and found.shape == x.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("order", [1, 2, 8, 16, 64, 256])
def test_reference_is_the_transform_of_qjax(order):
    x = inputs(Spec(3, 256, order))
    check(reference.hadamard(x, order), x, order, jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", TESTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel, spec, dtype):
    x = inputs(spec, dtype)
    check(KERNELS[kernel](x, spec.block, interpret=True), x, spec.block, dtype)


def test_small_orders_interpreted_on_the_gpu_kernel():
    x = inputs(Spec(3, 64, 16))
    check(pallas_gpu.hadamard(x, 16, interpret=True), x, 16, jnp.float32)


@pytest.mark.parametrize("spec", TESTS[:2], ids=str)
def test_interpreted_as_a_tpu_with_unwritten_memory_nan(spec):
    x = inputs(spec)
    interpreter = ladder.tpu_interpreter(detect_races=True)
    check(pallas_tpu.hadamard(x, spec.block, interpret=interpreter), x, spec.block, jnp.float32)
    assert not ladder.races_found(interpreter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [TESTS[0], *BENCHES], ids=str)
@pytest.mark.parametrize(("kernel", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_lowers(kernel, platform, spec, dtype):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), dtype)
    ladder.exported(platform, functools.partial(KERNELS[kernel], block=spec.block), x)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("spec", [TESTS[0], *BENCHES], ids=str)
def test_compiles_for_tpu(topology, spec, dtype):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), dtype)
    ladder.compiled_for_tpu(topology, functools.partial(pallas_tpu.hadamard, block=spec.block), x)


@pytest.mark.parametrize("spec", [BENCHES[1], Spec(256, 4096, 4096), Spec(256, 14336, 128)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moves_its_bytes_once(kernel, spec):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), jnp.bfloat16)
    moved = ladder.hbm_bytes(functools.partial(KERNELS[kernel], block=spec.block), x)
    factors = 4 * 2 * 128**2  # of ±1, at most 128 × 128 each, read beside x
    assert 4 * spec.rows * spec.n < moved <= 1.1 * 4 * spec.rows * spec.n + factors


def test_is_its_own_derivative():
    x = inputs(TESTS[0])
    value, pull = jax.vjp(lambda x: hadamard(x, 128), x)
    np.testing.assert_allclose(pull(value)[0], x, atol=1e-5)


def test_clear_errors():
    x = inputs(TESTS[0])
    with pytest.raises(ValueError, match="order 384 for rows of 384 values; it is a power of two"):
        hadamard(x)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        hadamard(x, 128, "cuda")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="pallas_tpu cannot run: it runs on tpu and the backend is cpu"):
            hadamard(x, 128, "pallas_tpu")
    assert "orders 128 to" in pallas_tpu.obstacle(64, jnp.float32)
    assert "no float16" in pallas_tpu.obstacle(128, jnp.float16)
    assert "orders 16 to" in pallas_gpu.obstacle(8, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*TESTS, *BENCHES], ids=str)
def test_device(spec, dtype):
    x = inputs(spec, dtype)
    check(jax.jit(lambda x: hadamard(x, spec.block, "pallas_gpu"))(x), x, spec.block, dtype)
