"""Products with computed trellis codes: decoded bit for bit as qjax does, on both kernels and every rung."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import dequantize, matmul, pallas_gpu, pallas_tpu, repack_trellis, trellis
from pallas_kernels.dequant_matmul.specs import TRELLIS_BENCHES, TRELLIS_TESTS
from qjax import codebooks
from qjax.codebooks import trellis_codes

KERNELS = {"gpu": pallas_gpu.matmul, "tpu": pallas_tpu.matmul}


def stored(spec, seed=0):
    """(x, codebook, symbols, packed matrix with scales)."""
    rng = np.random.default_rng(seed)
    codebook = codebooks.make("trellis", spec.bits, L=spec.L, code=spec.code)
    symbols = rng.integers(0, 2**spec.bits, (spec.out // 16, spec.inner // 16, 256)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (spec.out, 1)).astype(np.float32)
    x = rng.standard_normal((spec.batch, spec.inner)).astype(np.float32)

    @jax.jit  # one compilation instead of one for every operation
    def make(symbols, scale):
        words = codebook.pack(symbols)
        weight = repack_trellis(words, spec.bits, (spec.out, spec.inner), scale, spec.code, spec.L)
        return codebook.dequantize(symbols) * scale, weight

    return jnp.asarray(x), *make(jnp.asarray(symbols), jnp.asarray(scale))


def abstract(spec, dtype):
    shape = jax.ShapeDtypeStruct
    words = shape((spec.out * spec.inner * spec.bits // 32,), jnp.uint32)
    make = functools.partial(repack_trellis, bits=spec.bits, shape=(spec.out, spec.inner), code=spec.code, L=spec.L)
    weight = jax.eval_shape(lambda w, s: make(w, scale=s), words, shape((1, 1), jnp.float32))
    return shape((spec.batch, spec.inner), dtype), weight


def check(found, x, dense):
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(dense.astype(x.dtype), np.float64).T
    atol = np.abs(expected).max() * (1e-5 if x.dtype == jnp.float32 else 1e-2)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol)


@pytest.mark.parametrize("code", trellis.CODES)
def test_all_states_have_the_values_of_qjax(code):
    states = jnp.arange(2**16, dtype=jnp.uint32)
    expected = trellis_codes.state_values(code, states)[:, 0]
    np.testing.assert_array_equal(jax.jit(functools.partial(trellis.state_values, code))(states), expected)


@pytest.mark.parametrize("spec", TRELLIS_TESTS, ids=str)
def test_repacked_stream_decodes_to_the_same_bits(spec):
    x, dense, weight = stored(spec)
    rtol = 2**-22 if spec.code == "1mad" else 0  # a compiler may join the two scales of 1MAD
    np.testing.assert_allclose(jax.jit(dequantize)(weight).T, dense, rtol=rtol, atol=0)
    check(jax.jit(matmul, static_argnums=2)(x, weight, "xla"), x, dense)


@pytest.mark.parametrize("spec", TRELLIS_TESTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel, spec):
    x, dense, weight = stored(spec)
    dtype = jnp.bfloat16 if spec.bits == 2 else jnp.float32
    x = x.astype(dtype)
    check(jax.jit(functools.partial(KERNELS[kernel], interpret=True))(x, weight), x, dense)


def test_interpreted_as_a_tpu_with_unwritten_memory_nan():
    x, dense, weight = stored(TRELLIS_TESTS[1])
    interpreter = ladder.tpu_interpreter(detect_races=True)
    check(pallas_tpu.matmul(x, weight, interpret=interpreter), x, dense)
    assert not ladder.races_found(interpreter)


@pytest.mark.parametrize("spec", [TRELLIS_TESTS[2], *TRELLIS_BENCHES[:4]], ids=str)
@pytest.mark.parametrize(("kernel", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_lowers(kernel, platform, spec):
    ladder.exported(platform, KERNELS[kernel], *abstract(spec, jnp.bfloat16))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("spec", [*TRELLIS_TESTS, *TRELLIS_BENCHES], ids=str)
def test_compiles_for_tpu(topology, spec):
    ladder.compiled_for_tpu(topology, pallas_tpu.matmul, *abstract(spec, jnp.bfloat16))


@pytest.mark.parametrize("spec", TRELLIS_BENCHES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moves_the_packed_bytes_once(kernel, spec):
    moved = ladder.hbm_bytes(KERNELS[kernel], *abstract(spec, jnp.bfloat16))
    assert moved <= 1.1 * (spec.bits * spec.out * spec.inner // 8 + 4 * spec.out + 2 * 16 * (spec.inner + spec.out))


def test_clear_errors():
    words, scale = jnp.zeros(16, jnp.uint32), jnp.ones((1, 1), jnp.float32)
    with pytest.raises(ValueError, match="trellis code 'nope', 2 bits, L = 16; allowed are 1mad, 3inst, mul1, hyb"):
        repack_trellis(words, 2, (16, 16), scale, "nope")
    with pytest.raises(ValueError, match="16 words for a trellis of 16×32; tiles are 16×16, 32 words"):
        repack_trellis(words, 2, (16, 32), scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [*TRELLIS_TESTS, TRELLIS_BENCHES[0], TRELLIS_BENCHES[3]], ids=str)
def test_device(spec, dtype):
    x, dense, weight = stored(spec)
    check(jax.jit(lambda x, w: matmul(x, w, "pallas_gpu"))(x.astype(dtype), weight), x.astype(dtype), dense)
