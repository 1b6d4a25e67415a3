"""Xᵀ X by the tiles of its lower triangle: against NumPy in float64, and every rung of the ladder."""

import functools

import jax
import jax.numpy as jnp
import ladder
import numpy as np
import pytest

from pallas_kernels.gram import chosen, gram, pallas_mosaic_gpu, pallas_tpu, reference
from pallas_kernels.gram.specs import BENCHES, TESTS, Spec
from pallas_kernels.gram.triangle import grid_of, tile_of


def rows_of(spec, dtype):
    return jnp.asarray(np.random.default_rng(0).standard_normal((spec.rows, spec.n)), dtype)


def check(found, x):
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    terms = np.abs(wide).T @ np.abs(wide)  # what a float32 sum of these terms may lose
    assert found.dtype == jnp.float32 and np.array_equal(found, found.T)
    assert np.all(np.abs(np.asarray(found, np.float64) - wide.T @ wide) <= 8 * 2.0**-24 * terms)


@pytest.mark.parametrize("tiles", range(1, 12))
def test_the_rectangle_holds_every_tile_once(tiles):
    found = [tile_of(p, q, tiles) for p in range(grid_of(tiles)[0]) for q in range(grid_of(tiles)[1])]
    assert sorted(found) == [(i, j) for i in range(tiles) for j in range(i + 1)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [1, 32, 37, 48, 172, 300])
def test_reference(n, dtype):
    x = rows_of(Spec(70, n), dtype)
    check(jax.jit(gram)(x), x)


@pytest.mark.parametrize("n", [32, 37, 48, 172])
@pytest.mark.parametrize("kernel", [pallas_tpu, pallas_mosaic_gpu], ids=["tpu", "gpu"])
def test_interpreted_widths_that_are_no_whole_tile(kernel, n):
    x = rows_of(Spec(40, n), jnp.float32)
    interpreter = ladder.tpu_interpreter() if kernel is pallas_tpu else ladder.gpu_interpreter()
    check(kernel.gram(x, interpret=interpreter), x)


@pytest.mark.parametrize(
    ("spec", "dtype"), [(TESTS[0], jnp.bfloat16), (TESTS[1], jnp.float32), (TESTS[2], jnp.float32)]
)
def test_interpreted_as_a_tpu_with_unwritten_memory_nan(spec, dtype):
    x = rows_of(spec, dtype)
    interpreter = ladder.tpu_interpreter(detect_races=True)
    check(pallas_tpu.gram(x, interpret=interpreter, tile=128, depth=64), x)
    assert not ladder.races_found(interpreter)


@pytest.mark.parametrize(("spec", "dtype"), [(TESTS[0], jnp.bfloat16), (TESTS[1], jnp.float32)])
def test_interpreted_as_a_gpu_with_unwritten_memory_nan(spec, dtype):
    x = rows_of(spec, dtype)
    check(pallas_mosaic_gpu.gram(x, interpret=ladder.gpu_interpreter()), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [TESTS[0], BENCHES[1]], ids=str)
def test_lowers(spec, dtype):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), dtype)
    ladder.exported("tpu", pallas_tpu.gram, x)
    ladder.exported("cuda", pallas_mosaic_gpu.gram, x, call=ladder.MOSAIC_CALL)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("spec", [TESTS[0], *BENCHES], ids=str)
def test_compiles_for_tpu(topology, spec, dtype):
    ladder.compiled_for_tpu(topology, pallas_tpu.gram, jax.ShapeDtypeStruct((spec.rows, spec.n), dtype))


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_moves_half_of_what_a_whole_product_would(kernel):
    """Tiles of T columns: every tile of the triangle reads two strips of X; a whole product reads twice as many."""
    spec = Spec(1024, 2048)
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), jnp.bfloat16)
    if kernel == "tpu":
        moved, tile = ladder.hbm_bytes(pallas_tpu.gram, x), 512
    else:
        moved, tile = ladder.mosaic_bytes(pallas_mosaic_gpu.gram, x, uniform=True), 128
    tiles = spec.n // tile
    strips = tiles * (tiles + 1) // 2 * 2 * spec.rows * tile * 2
    written = tiles * (tiles + 1) // 2 * tile**2 * 4
    assert moved <= strips + written


def test_xla_unless_a_kernel_is_named():
    assert chosen(jnp.float32) == "xla"
    with pytest.raises(ValueError, match="dtype float16; allowed are float32 and bfloat16"):
        gram(jnp.zeros((2, 2), jnp.float16))
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="gram: mosaic_gpu cannot run: it runs on gpu and the backend is cpu"):
            gram(jnp.zeros((2, 2)), "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", [*TESTS, Spec(2048, 1024)], ids=str)
def test_device(spec, dtype):
    if reason := pallas_mosaic_gpu.obstacle(dtype):
        pytest.skip(reason)
    x = rows_of(spec, dtype)
    found = jax.jit(functools.partial(gram, implementation="mosaic_gpu"))(x)
    np.testing.assert_allclose(found, reference.gram(x), rtol=0, atol=1e-5 * float(jnp.abs(found).max()))
