"""The kernels for Mosaic GPU: their layout, interpretation as a GPU, lowering for it, and the bytes they move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels import KernelError, dequant_matmul, dispatch, mosaic_gpu, triton, tuned
from pallas_kernels.bench.cases import packed
from pallas_kernels.dequant_matmul import dequantize, from_rows, matmul, pallas_mosaic_gpu, to_rows, trellis
from pallas_kernels.dequant_matmul.specs import MOSAIC_BENCHES, MOSAIC_TESTS, Spec
from pallas_kernels.hadamard import chosen as chosen_transform
from pallas_kernels.hadamard import hadamard, reference
from pallas_kernels.hadamard import pallas_mosaic_gpu as transform
from pallas_kernels.hadamard.specs import BENCHES as TRANSFORMS
from pallas_kernels.hadamard.specs import Spec as Transform

H100 = 132


@functools.cache
def stored(spec):
    """(the packed matrix, the same in rows, Wᵀ in float64)."""
    weight = packed(spec, jax.random.key(spec.bits))
    if spec.code is None:  # of every output, or group, its own
        rng = np.random.default_rng(0)
        scale, offset = (rng.uniform(0.5, 1.5, weight.scale.shape).astype(np.float32) for _ in range(2))
        weight = dataclasses.replace(weight, scale=jnp.asarray(scale), offset=jnp.asarray(offset))
    return weight, jax.jit(to_rows)(weight), np.asarray(jax.jit(dequantize)(weight), np.float64)


def abstract(spec, dtype):
    weight = jax.eval_shape(lambda key: to_rows(packed(spec, key)), jax.random.key(0))
    return jax.ShapeDtypeStruct((spec.batch, spec.inner), dtype), weight


def rows_of(spec, dtype):
    x = np.random.default_rng(1).standard_normal((spec.batch, spec.inner)).astype(np.float32)
    return jnp.asarray(x * 10.0 ** np.arange(-2, spec.batch - 2)[:, None].clip(-2, 3).astype(np.float32), dtype)


def check(found, x, dense, spec):
    if spec.group is not None:  # rounded to the dtype of x, as in the reference
        dense = np.asarray(jnp.asarray(dense, jnp.float32).astype(x.dtype), np.float64)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    assert found.dtype == x.dtype and found.shape == expected.shape
    limit = {"float32": 2e-6, "bfloat16": 2.0**-8}[x.dtype.name]
    size = np.abs(expected).max(axis=1, keepdims=True)  # every row on its own: their sizes differ
    assert np.max(np.abs(np.asarray(found, np.float64) - expected) / size) <= limit


@pytest.mark.parametrize("code", trellis.CODES)
def test_all_states_are_exact_in_float16(code):
    states = jnp.arange(2**16, dtype=jnp.uint32)
    found = jax.jit(functools.partial(trellis.half_values, code))(states)
    assert found.dtype == jnp.float16
    wide = found.astype(jnp.float32) * np.float32(trellis.unit(code))
    np.testing.assert_array_equal(wide, trellis.state_values(code, states))


@pytest.mark.parametrize("spec", MOSAIC_TESTS, ids=str)
def test_rows_hold_the_same_matrix(spec):
    weight, rows, _ = stored(spec)
    np.testing.assert_array_equal(from_rows(rows).words, weight.words)
    assert rows.padded == weight.padded and rows.blocks_per_scale == weight.blocks_per_scale
    extra = rows.nbytes - weight.nbytes
    assert extra == (0 if spec.code is None else weight.words.nbytes // (16 * spec.bits))


@pytest.mark.parametrize(
    ("spec", "dtype"), [(s, jnp.bfloat16 if i % 2 else jnp.float32) for i, s in enumerate(MOSAIC_TESTS)], ids=str
)
def test_interpreted_as_a_gpu(spec, dtype):
    _, rows, dense = stored(spec)
    x = rows_of(spec, dtype)
    found = pallas_mosaic_gpu.matmul(x, rows, interpret=ladder.gpu_interpreter(), processors=2)
    check(found, x, dense, spec)


@pytest.mark.parametrize(
    ("spec", "dtype"), [(s, jnp.float32 if i % 3 == 2 else jnp.bfloat16) for i, s in enumerate(MOSAIC_BENCHES)], ids=str
)
def test_lowers_for_cuda(spec, dtype):
    run = functools.partial(pallas_mosaic_gpu.matmul, processors=H100)
    ladder.exported("cuda", run, *abstract(spec, dtype), call=ladder.MOSAIC_CALL)


@pytest.mark.parametrize("spec", MOSAIC_BENCHES, ids=str)
def test_moves_the_packed_bytes_once(spec):
    x, rows = abstract(spec, jnp.bfloat16)
    moved = ladder.mosaic_bytes(functools.partial(pallas_mosaic_gpu.matmul, processors=H100), x, rows, uniform=True)
    weights = spec.bits * spec.out * spec.inner // 8
    scales = 0 if spec.group is None else 2 * rows.scale.size * rows.scale.dtype.itemsize
    assert weights + scales < moved <= 1.1 * (weights + scales + 2 * 16 * (spec.inner + spec.out))


@pytest.mark.parametrize("spec", [Transform(3, 384, 128), Transform(70, 64, 16), Transform(5, 1024, 512)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_transform_interpreted_as_a_gpu(spec, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((spec.rows, spec.n)), dtype)
    found = transform.hadamard(x, spec.block, interpret=ladder.gpu_interpreter(), processors=1)
    matrix = np.asarray(reference.sylvester(spec.block), np.float64) / np.sqrt(spec.block)
    expected = np.asarray(x.astype(jnp.float32), np.float64).reshape(-1, spec.block) @ matrix
    assert found.dtype == dtype and found.shape == x.shape
    size = np.abs(expected).max()
    limit = 2e-6 if dtype == jnp.float32 else 2.0**-8
    assert np.max(np.abs(np.asarray(found, np.float64).reshape(expected.shape) - expected)) <= limit * size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", TRANSFORMS, ids=str)
def test_transform_lowers_for_cuda(spec, dtype):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), dtype)
    run = functools.partial(transform.hadamard, block=spec.block, processors=H100)
    ladder.exported("cuda", run, x, call=ladder.MOSAIC_CALL)


@pytest.mark.parametrize("spec", [*TRANSFORMS[:2], Transform(64, 4096, 4096), Transform(64, 14336, 128)], ids=str)
def test_transform_moves_its_bytes_once(spec):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), jnp.bfloat16)
    moved = ladder.mosaic_bytes(functools.partial(transform.hadamard, block=spec.block, processors=H100), x)
    values = 4 * spec.rows * spec.n
    assert values < moved <= values + 2 * (128**2 + 64**2)  # the two factors beside x and y


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.delenv("QJAX_DISABLE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    for module in (pallas_mosaic_gpu, transform):
        monkeypatch.setattr(module, "unavailable", lambda: None)


def test_triton_first_then_mosaic_then_xla(on_hopper, monkeypatch):
    weight, rows, _ = stored(MOSAIC_TESTS[4])
    chosen = functools.partial(dequant_matmul.chosen, 1, jnp.bfloat16)
    assert chosen(weight) == "pallas_gpu" and chosen(rows) == "mosaic_gpu"
    assert dequant_matmul.prepared(weight) is weight
    assert isinstance(dequant_matmul.prepared(weight, "mosaic_gpu"), dequant_matmul.RowMatrix)
    assert chosen_transform(128, jnp.bfloat16) == "pallas_gpu"
    with pytest.raises(KernelError, match="pallas_gpu cannot run: the matrix is arranged for mosaic_gpu"):
        chosen(rows, "pallas_gpu")
    with pytest.raises(KernelError, match="at most 16 rows, found 17"):
        dequant_matmul.chosen(17, jnp.bfloat16, weight, "mosaic_gpu")
    assert dequant_matmul.chosen(17, jnp.bfloat16, rows) == "xla"
    monkeypatch.setattr(triton, "triton", None)  # a jax without it
    assert chosen(weight) == "mosaic_gpu" and chosen_transform(128, jnp.bfloat16) == "mosaic_gpu"
    assert dequant_matmul.chosen(1, jnp.float32, stored(MOSAIC_TESTS[1])[0]) == "xla"  # it has groups
    monkeypatch.setattr(pallas_mosaic_gpu, "unavailable", lambda: "no Hopper")
    assert chosen(weight) == "xla"


def test_what_was_measured_to_be_faster_comes_first(on_hopper, monkeypatch, tmp_path):
    weight = stored(MOSAIC_TESTS[4])[0]
    path = tmp_path / "tuned.json"
    key = pallas_mosaic_gpu.key(1, weight)
    tuned.store("dequant_matmul first choice", {key: {"mosaic_gpu": 1}}, tuned.device_kind(), path)
    monkeypatch.setattr(tuned, "load", lambda own=tuned.load.__wrapped__: own(path))
    assert dequant_matmul.chosen(1, jnp.bfloat16, weight) == "mosaic_gpu"
    assert dequant_matmul.chosen(16, jnp.bfloat16, weight) == "pallas_gpu"  # of which nothing was measured


def test_a_matrix_in_rows_falls_back_to_xla():
    spec = MOSAIC_TESTS[3]
    _, rows, dense = stored(spec)
    x = rows_of(spec, jnp.float32)
    check(jax.jit(matmul)(x, rows), x, dense, spec)
    pulled = jax.jit(jax.grad(lambda x: jnp.sum(matmul(x, rows))))(x)
    np.testing.assert_allclose(pulled, np.broadcast_to(dense.sum(axis=1), x.shape), rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_said():
    weight = packed(Spec(2, 1, 128, 512, None, "e8p"), jax.random.key(0))
    x = jnp.ones((1, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="code 'e8p' looks values up, and Mosaic GPU has no gather"):
        pallas_mosaic_gpu.matmul(x, weight)
    with pytest.raises(KernelError, match="code 'e8p' has a table"):
        to_rows(weight)
    with pytest.raises(NotImplementedError, match="orders 16 to 8192, found 8"):
        transform.hadamard(x, 8)
    assert "compute capability 9" in mosaic_gpu.unavailable()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [*MOSAIC_TESTS, *MOSAIC_BENCHES], ids=str)
def test_device(spec, dtype):
    if reason := pallas_mosaic_gpu.obstacle(spec.batch, dtype, stored(spec)[0]):
        pytest.skip(reason)
    _, rows, dense = stored(spec)
    x = rows_of(spec, dtype)
    check(jax.jit(lambda x, w: matmul(x, w, "mosaic_gpu"))(x, rows), x, dense, spec)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [Transform(70, 64, 16), Transform(5, 1024, 512), *TRANSFORMS], ids=str)
def test_transform_on_the_device(spec, dtype):
    if reason := transform.obstacle(spec.block, dtype):
        pytest.skip(reason)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((spec.rows, spec.n)), dtype)
    found = jax.jit(lambda x: hadamard(x, spec.block, "mosaic_gpu"))(x).astype(jnp.float32)
    expected = reference.hadamard(x.astype(jnp.float32), spec.block)
    limit = 1e-5 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * float(jnp.abs(expected).max()))
