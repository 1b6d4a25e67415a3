"""Every GPU kernel down to machine code for an H100, without one: what lowering alone does not find.

Not part of `make test`: `make test-gpu-aot` says what it needs. A kernel that does not compile can end the process
(Triton's compiler has crashed on arrays of one value), so a failure may be that of the test that was running.
"""

import functools

import jax
import jax.numpy as jnp
import ladder
import pytest

from pallas_kernels.bench.cases import packed
from pallas_kernels.bench.checks import search_operands
from pallas_kernels.dequant_matmul import pallas_gpu, pallas_mosaic_gpu
from pallas_kernels.dequant_matmul import specs as products
from pallas_kernels.gram import pallas_mosaic_gpu as gram
from pallas_kernels.gram import specs as grams
from pallas_kernels.hadamard import pallas_gpu as transform
from pallas_kernels.hadamard import pallas_mosaic_gpu as mosaic_transform
from pallas_kernels.hadamard import specs as transforms
from pallas_kernels.viterbi import pallas_gpu as search
from pallas_kernels.viterbi import specs as searches

pytestmark = pytest.mark.gpu_aot

PRODUCTS = (*products.TESTS, *products.TRELLIS_TESTS, *products.TABLE_TESTS)
LARGE = [s for s in (*products.BENCHES, *products.TRELLIS_BENCHES, *products.TABLE_BENCHES) if s.inner == s.out == 8192]
DTYPES = [jnp.bfloat16, jnp.float32]


def operands(spec, dtype):
    weight = jax.eval_shape(functools.partial(packed, spec), jax.random.key(0))
    return jax.ShapeDtypeStruct((spec.batch, spec.inner), dtype), weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", PRODUCTS, ids=str)
def test_products(spec, dtype):
    ladder.compiled_for_gpu(functools.partial(pallas_gpu.matmul, blocks={}), *operands(spec, dtype))


@pytest.mark.parametrize("spec", LARGE, ids=str)
def test_large_products(spec):
    ladder.compiled_for_gpu(functools.partial(pallas_gpu.matmul, blocks={}), *operands(spec, jnp.bfloat16))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("spec", [LARGE[0], products.TRELLIS_BENCHES[4]], ids=str)
def test_what_tuning_tries(spec, batch):
    for blocks in pallas_gpu.candidates(batch):
        own = products.Spec(spec.bits, batch, 1024, 4096, None, spec.code)
        ladder.compiled_for_gpu(functools.partial(pallas_gpu.matmul, blocks=blocks), *operands(own, jnp.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", products.MOSAIC_TESTS, ids=str)
def test_products_of_mosaic(spec, dtype):
    x, weight = operands(spec, dtype)
    if pallas_mosaic_gpu.cannot(spec.batch, dtype, weight):
        pytest.skip(pallas_mosaic_gpu.cannot(spec.batch, dtype, weight))
    ladder.compiled_for_gpu(functools.partial(pallas_mosaic_gpu.matmul, blocks={}, processors=132), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*transforms.TESTS, *transforms.BENCHES], ids=str)
def test_transforms(spec, dtype):
    x = jax.ShapeDtypeStruct((spec.rows, spec.n), dtype)
    ladder.compiled_for_gpu(lambda x: transform.hadamard(x, spec.block), x)
    ladder.compiled_for_gpu(lambda x: mosaic_transform.hadamard(x, spec.block, processors=132), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*grams.TESTS, *grams.BENCHES], ids=str)
def test_triangles(spec, dtype):
    ladder.compiled_for_gpu(gram.gram, jax.ShapeDtypeStruct((spec.rows, spec.n), dtype))


@pytest.mark.parametrize("spec", [*searches.TESTS, *searches.BENCHES], ids=str)
def test_searches(spec):
    assert search.obstacle(2**spec.L, spec.b) is None
    shapes = jax.eval_shape(functools.partial(search_operands, spec))
    ladder.compiled_for_gpu(lambda x, lut, cost: search.search(x, lut, spec.b, cost, None), *shapes)
