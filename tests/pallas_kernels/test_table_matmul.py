"""Products with codes that have a table, HYB and the E8P family: qjax's own values, both kernels, every rung."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import (
    dequantize,
    matmul,
    pallas_gpu,
    pallas_tpu,
    repack_lattice,
    repack_trellis,
    tables,
)
from pallas_kernels.dequant_matmul.specs import TABLE_BENCHES, TABLE_TESTS, Spec
from qjax import codebooks
from qjax.codebooks import e8p, e81b, trellis_codes

KERNELS = {"gpu": pallas_gpu.matmul, "tpu": pallas_tpu.matmul}
RANDOM = np.random.default_rng(7).standard_normal((512, 2)).astype(np.float16).astype(np.float32)


def book(spec):
    if spec.code != "hyb":
        return codebooks.make(spec.code, spec.bits)
    return codebooks.make("trellis", spec.bits, L=spec.L, code="lut", V=2).replace(code="hyb", table=RANDOM)


def repacked(spec, codebook, words, scale):
    shape = (spec.out, spec.inner)
    if spec.code == "hyb":
        return repack_trellis(words, spec.bits, shape, scale, "hyb", spec.L, jnp.asarray(RANDOM))
    second = jnp.asarray(e81b.e81b_table()) if spec.bits == 3 else None
    residual = codebook.residual_scale if spec.bits > 2 else None
    return repack_lattice(words, spec.bits, shape, scale, jnp.asarray(e8p.e8p_table()), second, residual)


def codes_of(spec, codebook, rng):
    if spec.code == "hyb":
        return rng.integers(0, 2**codebook.step_bits, (spec.out // 16, spec.inner // 16, 128)).astype(
            codebook.code_dtype
        )
    shape = (spec.out, spec.inner // 8)
    codes = rng.integers(0, 2**16, shape).astype(np.uint32)
    if spec.bits > 2:
        codes = codes << 16 | rng.integers(0, 2 ** (8 * (spec.bits - 2)), shape).astype(np.uint32)
    return codes.astype(codebook.code_dtype)


@functools.cache
def stored(spec):
    """(x, the dense matrix of qjax, packed matrix with scales)."""
    rng, codebook = np.random.default_rng(0), book(spec)
    scale = rng.uniform(0.5, 1.5, (spec.out, 1)).astype(np.float32)
    x = rng.standard_normal((spec.batch, spec.inner)).astype(np.float32)

    @jax.jit
    def make(codes, scale):
        return codebook.dequantize(codes) * scale, repacked(spec, codebook, codebook.pack(codes), scale)

    return jnp.asarray(x), *make(jnp.asarray(codes_of(spec, codebook, rng)), jnp.asarray(scale))


def abstract(spec, dtype):
    shape = jax.ShapeDtypeStruct
    words = shape((spec.out * spec.inner * spec.bits // 32,), jnp.uint32)
    codebook = book(spec)
    weight = jax.eval_shape(functools.partial(repacked, spec, codebook), words, shape((1, 1), jnp.float32))
    return shape((spec.batch, spec.inner), dtype), weight


def check(found, x, dense):
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(dense.astype(x.dtype), np.float64).T
    atol = np.abs(expected).max() * (1e-5 if x.dtype == jnp.float32 else 1e-2)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol)


def taken(table):
    return lambda first, count, index: jnp.take(table, index.astype(jnp.int32) + first, mode="clip")


def test_all_codewords_of_e8p_are_those_of_qjax():
    codes = jnp.arange(2**16, dtype=jnp.uint32).reshape(1, -1)
    expected = codebooks.make("e8p", 2).dequantize(codes.astype(jnp.uint16)).reshape(-1, 8)
    table = jnp.asarray(e8p.e8p_table())
    found = jax.jit(lambda codes: jnp.stack(tables.e8p_values(codes[0], taken(table)), axis=1))(codes)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(np.asarray(found), axis=0)) == 2**16


def test_all_states_of_hyb_are_those_of_qjax():
    states = jnp.arange(2**16, dtype=jnp.uint32)
    table = jnp.asarray(jax.lax.bitcast_convert_type(RANDOM.T.reshape(-1), jnp.uint32))
    found = jax.jit(lambda s: jnp.stack(tables.hyb_values(s, 512, 2, taken(table)), axis=1))(states)
    np.testing.assert_array_equal(found, trellis_codes.hybrid_values(states, RANDOM))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_codeword_survives_repacking(bits):
    """All 65,536 of the first stage, each with some of the second's, through the stream, the slabs and the scales."""
    spec = Spec(bits, 1, 128, 4096, None, "e8p" if bits == 2 else "e8p_rvq")
    codebook = book(spec)
    codes = np.arange(2**16, dtype=np.uint32).reshape(128, 512)
    if bits > 2:
        codes = codes << 16 | codes.T.reshape(128, 512) * 40503 % 2 ** (8 * (bits - 2))
    codes = jnp.asarray(codes.astype(codebook.code_dtype))
    ones = jnp.ones((1, 1), jnp.float32)
    found = jax.jit(lambda c: dequantize(repacked(spec, codebook, codebook.pack(c), ones)).T)(codes)
    # the second stage is multiplied by 1 / r where qjax divides by r
    np.testing.assert_allclose(found, codebook.dequantize(codes), rtol=0, atol=0 if bits == 2 else 2**-21)


@pytest.mark.parametrize("spec", TABLE_TESTS, ids=str)
def test_repacked_stream_decodes_to_the_same_values(spec):
    x, dense, weight = stored(spec)
    np.testing.assert_allclose(jax.jit(dequantize)(weight).T, dense, rtol=2e-6, atol=1e-6)
    assert weight.words.nbytes == spec.bits * np.prod(weight.padded) // 8
    check(jax.jit(matmul, static_argnums=2)(x, weight, "xla"), x, dense)


@pytest.mark.parametrize("spec", TABLE_TESTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel, spec):
    x, dense, weight = stored(spec)
    x = x.astype(jnp.bfloat16 if spec.bits == 2 else jnp.float32)
    check(jax.jit(functools.partial(KERNELS[kernel], interpret=True))(x, weight), x, dense)


@pytest.mark.parametrize("spec", [TABLE_TESTS[1], TABLE_TESTS[4]], ids=str)
def test_interpreted_as_a_tpu_with_unwritten_memory_nan(spec):
    x, dense, weight = stored(spec)
    interpreter = ladder.tpu_interpreter(detect_races=True)
    check(pallas_tpu.matmul(x, weight, interpret=interpreter), x, dense)
    assert not ladder.races_found(interpreter)


@pytest.mark.parametrize("spec", [*TABLE_TESTS[1:3], TABLE_TESTS[4], *TABLE_BENCHES[::6]], ids=str)
@pytest.mark.parametrize(("kernel", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_lowers(kernel, platform, spec):
    ladder.exported(platform, KERNELS[kernel], *abstract(spec, jnp.bfloat16))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("spec", [*TABLE_TESTS, *TABLE_BENCHES], ids=str)
def test_compiles_for_tpu(topology, spec):
    ladder.compiled_for_tpu(topology, pallas_tpu.matmul, *abstract(spec, jnp.bfloat16))


@pytest.mark.parametrize("spec", TABLE_BENCHES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moves_the_packed_bytes_once(kernel, spec):
    moved = ladder.hbm_bytes(KERNELS[kernel], *abstract(spec, jnp.bfloat16))
    assert moved <= 1.1 * (spec.bits * spec.out * spec.inner // 8 + 4 * spec.out + 2 * 16 * (spec.inner + spec.out))


def test_clear_errors():
    words, scale, table = jnp.zeros(16, jnp.uint32), jnp.ones((1, 1), jnp.float32), jnp.zeros(256, jnp.uint32)
    with pytest.raises(ValueError, match="a lattice of 5 bits, 16×16; allowed are 2, 3, 4 bits"):
        repack_lattice(words, 5, (16, 16), scale, table)
    with pytest.raises(ValueError, match="16 words for 16×32 at 2 bits; expected 32"):
        repack_lattice(words, 2, (16, 32), scale, table)
    with pytest.raises(ValueError, match=r"tables of \[255\] entries at 2 bits; expected 256"):
        repack_lattice(words, 2, (16, 16), scale, table[1:])
    with pytest.raises(ValueError, match="residual_scale None at 4 bits; positive at 3 and 4"):
        repack_lattice(jnp.zeros(32, jnp.uint32), 4, (16, 16), scale, table)
    with pytest.raises(ValueError, match="code 'hyb' needs table"):
        repack_trellis(words, 2, (16, 16), scale, "hyb")
    with pytest.raises(ValueError, match=r"a table of \(100, 2\); HYB has 64 to 512 entries"):
        repack_trellis(words, 2, (16, 16), scale, "hyb", table=jnp.zeros((100, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [*TABLE_TESTS, *TABLE_BENCHES[:2]], ids=str)
def test_device(spec, dtype):
    x, dense, weight = stored(spec)
    check(jax.jit(lambda x, w: matmul(x, w, "pallas_gpu"))(x.astype(dtype), weight), x.astype(dtype), dense)
