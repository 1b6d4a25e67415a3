"""The packed product: the layout, both kernels against decode-then-multiply, the ladder, and the bytes they move."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels import dequant_matmul
from pallas_kernels.dequant_matmul import dequantize, from_codes, matmul, pallas_gpu, pallas_tpu, reference, repack
from pallas_kernels.dequant_matmul.specs import BENCHES, TESTS, Spec
from qjax import codebooks

KERNELS = {"gpu": pallas_gpu.matmul, "tpu": pallas_tpu.matmul}
DTYPES = (jnp.float32, jnp.bfloat16)


def parts(spec, seed=0):
    rng = np.random.default_rng(seed)
    groups = 1 if spec.group is None else -(-spec.inner // spec.group)
    codes = rng.integers(0, 2**spec.bits, (spec.out, spec.inner)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (spec.out, groups)).astype(np.float32) / 2**spec.bits
    offset = rng.standard_normal((spec.out, groups)).astype(np.float32) / 4
    x = rng.standard_normal((spec.batch, spec.inner)).astype(np.float32)
    return x, codes, scale, offset


def dense(spec, codes, scale, offset):
    spread = lambda v: np.repeat(v, spec.group or spec.inner, axis=1)[:, : spec.inner]  # noqa: E731
    return codes.astype(np.float32) * spread(scale) + spread(offset)


def packed(spec, seed=0):
    x, codes, scale, offset = parts(spec, seed)
    make = jax.jit(lambda c, s, o: from_codes(c, spec.bits, s, o, spec.group))  # one compilation, not one per operation
    return x, make(codes, scale, offset)


def abstract(spec, dtype):
    """Shapes of x and of the packed matrix: nothing is computed."""
    groups = 1 if spec.group is None else -(-spec.inner // spec.group)
    shape = jax.ShapeDtypeStruct
    scale = shape((spec.out, groups), jnp.bfloat16)
    make = functools.partial(from_codes, bits=spec.bits, group=spec.group)
    weight = jax.eval_shape(
        lambda c, s, o: make(c, scale=s, offset=o), shape((spec.out, spec.inner), jnp.uint8), scale, scale
    )
    return shape((spec.batch, spec.inner), dtype), weight


def check(found, x, weight, dtype):
    """Against the sum in float64 of the same rounded operands."""
    operands = (
        np.asarray(jnp.asarray(v).astype(dtype).astype(jnp.float32), np.float64)
        for v in (x, jax.jit(dequantize)(weight))
    )
    expected = np.matmul(*operands)
    assert found.dtype == dtype and found.shape == expected.shape
    size = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, atol=size * (1e-5 if dtype == jnp.float32 else 1e-2)
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_decodes_to_the_dense_matrix(bits):
    spec = Spec(bits, 1, 40, 600, 64)
    _, codes, scale, offset = parts(spec)
    weight = from_codes(jnp.asarray(codes), bits, jnp.asarray(scale), jnp.asarray(offset), 64)
    np.testing.assert_allclose(jax.jit(dequantize)(weight).T, dense(spec, codes, scale, offset), rtol=1e-6, atol=1e-6)
    assert weight.words.nbytes == bits * 128 * 1024 // 8


@pytest.mark.parametrize("spec", TESTS, ids=str)
def test_reference(spec):
    x, codes, scale, offset = parts(spec)
    weight = packed(spec)[1]
    np.testing.assert_allclose(jax.jit(dequantize)(weight).T, dense(spec, codes, scale, offset), rtol=1e-6, atol=1e-6)
    check(matmul(jnp.asarray(x), weight, "xla"), x, weight, jnp.float32)


@pytest.mark.parametrize(("name", "bits"), [("half_integer", 2), ("quip_grid", 3), ("half_integer", 4), ("grid", 8)])
def test_repacks_the_stored_stream(name, bits):
    codebook = codebooks.make(name, bits)
    values = np.random.default_rng(0).standard_normal((33, 130)).astype(np.float32) * 2
    codes = codebook.quantize(jnp.asarray(values))
    first = jnp.full((1, 1), codebook.first, jnp.float32)
    weight = repack(codebook.pack(codes), bits, codes.shape, jnp.ones((1, 1), jnp.float32), first)
    np.testing.assert_array_equal(dequantize(weight).T, codebook.dequantize(codes))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, jnp.float32) for spec in TESTS), *((spec, jnp.bfloat16) for spec in TESTS[:2])],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel, spec, dtype):
    x, weight = packed(spec)
    x = jnp.asarray(x, dtype)
    check(jax.jit(functools.partial(KERNELS[kernel], interpret=True))(x, weight), x, weight, dtype)


@pytest.mark.parametrize("spec", TESTS[1:3], ids=str)
def test_interpreted_as_a_tpu_with_unwritten_memory_nan(spec):
    x, weight = packed(spec)
    interpreter = ladder.tpu_interpreter(detect_races=True)
    check(pallas_tpu.matmul(jnp.asarray(x), weight, interpret=interpreter), x, weight, jnp.float32)
    assert not ladder.races_found(interpreter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*TESTS[1:4], BENCHES[1]], ids=str)
@pytest.mark.parametrize(("kernel", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_lowers(kernel, platform, spec, dtype):
    ladder.exported(platform, KERNELS[kernel], *abstract(spec, dtype))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("spec", [*TESTS, BENCHES[0], BENCHES[4], BENCHES[29], BENCHES[38]], ids=str)
def test_compiles_for_tpu(topology, spec, dtype):
    ladder.compiled_for_tpu(topology, pallas_tpu.matmul, *abstract(spec, dtype))


@pytest.mark.parametrize("spec", BENCHES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_moves_the_packed_bytes_once(kernel, spec):
    x, weight = abstract(spec, jnp.bfloat16)
    moved = ladder.hbm_bytes(KERNELS[kernel], x, weight)
    stored = spec.bits * spec.out * spec.inner // 8 + weight.scale.size * 2 + weight.offset.size * 2
    activations = 2 * 16 * (spec.inner + spec.out)  # the matrix units' least number of rows
    assert moved <= 1.1 * (stored + activations)


def test_is_differentiable_in_x_and_scales():
    spec = TESTS[1]
    x, weight = packed(spec)
    x = jnp.asarray(x)
    value, pull = jax.vjp(
        lambda x, scale: matmul(
            x, dequant_matmul.PackedMatrix(weight.words, scale, weight.offset, spec.bits, weight.shape, spec.group)
        ),
        x,
        weight.scale,
    )
    by_x, by_scale = pull(jnp.ones_like(value))
    np.testing.assert_allclose(
        by_x, jnp.broadcast_to(jnp.sum(dequantize(weight), axis=1), x.shape), rtol=1e-4, atol=1e-3
    )
    assert by_scale.shape == weight.scale.shape and float(jnp.abs(by_scale).max()) > 0


def test_shape_chooses_the_implementation(monkeypatch):
    weight = packed(TESTS[0])[1]
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr("pallas_kernels.dispatch.backend", lambda backend=backend: backend)
        assert dequant_matmul.chosen(16, jnp.bfloat16, weight) == f"pallas_{backend}"
        assert dequant_matmul.chosen(17, jnp.bfloat16, weight) == "xla"
        expected = "xla" if backend == "tpu" else "pallas_gpu"
        assert dequant_matmul.chosen(1, jnp.float16, weight) == expected  # a TPU has no float16
        with pytest.raises(ValueError, match="at most 16 rows, found 17"):
            dequant_matmul.chosen(17, jnp.bfloat16, weight, f"pallas_{backend}")


def test_clear_errors():
    spec = TESTS[0]
    x, weight = packed(spec)
    with pytest.raises(ValueError, match="x has 511 columns and the matrix 512 inputs"):
        matmul(jnp.asarray(x[:, 1:]), weight)
    codes, ones = jnp.zeros((4, 96), jnp.uint8), jnp.ones((4, 1), jnp.float32)
    with pytest.raises(ValueError, match="codes of 9 bits"):
        from_codes(codes, 9, ones, ones)
    with pytest.raises(ValueError, match="groups of 24; allowed are 16, 32"):
        from_codes(codes, 4, ones, ones, 24)
    with pytest.raises(ValueError, match=r"scale of shape \(4, 1\); expected \(4 or 1, 3\)"):
        from_codes(codes, 4, ones, ones, 32)
    with pytest.raises(ValueError, match="a stream of 3 words for 4×96 codes of 4 bits; expected 48"):
        repack(jnp.zeros(3, jnp.uint32), 4, (4, 96), ones, ones)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*TESTS, BENCHES[0], BENCHES[1]], ids=str)
def test_device(spec, dtype):
    x, weight = packed(spec)
    x = jnp.asarray(x, dtype)
    check(jax.jit(lambda x, w: matmul(x, w, "pallas_gpu"))(x, weight), x, weight, dtype)
    check(jax.jit(lambda x, w: reference.matmul(x, w))(x, weight), x, weight, dtype)
