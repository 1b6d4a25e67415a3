"""Hadamard matrices and the fast transform, for every dimension of the models we know."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import InputError
from qjax.linalg.hadamard import (
    MAX_BASE,
    base_matrix,
    block_hadamard_transform,
    hadamard_factor,
    hadamard_transform,
    is_hadamard_order,
    next_hadamard_order,
)
from qjax.linalg.paley import paley_matrix, paley_type

# Dimension -> (K, 2^p), from the models' configurations and the list of Paley orders in the literature.
FACTORS = {
    576: (36, 16), 768: (12, 64), 896: (28, 32), 1536: (12, 128), 2048: (1, 2048),
    2304: (36, 64), 2560: (20, 128), 3072: (12, 256), 3584: (28, 128), 4096: (1, 4096),
    4864: (76, 64), 5120: (20, 256), 5632: (44, 128), 6656: (52, 128), 6912: (108, 64),
    8960: (140, 64), 9216: (36, 256), 9728: (76, 128), 10240: (20, 512), 11008: (344, 32),
    12288: (12, 1024), 13824: (108, 128), 14336: (28, 512), 15360: (60, 256), 17408: (68, 256),
    18944: (148, 128), 19968: (312, 64), 21504: (84, 256), 22016: (344, 64), 25600: (100, 256),
    27648: (108, 256), 28672: (28, 1024), 29568: (924, 32), 57344: (28, 2048),
}  # fmt: skip
TYPES = {
    "I": [12, 20, 28, 44, 60, 68, 84, 108, 140, 180, 312, 344, 464],
    "II": [36, 52, 76, 100, 124, 148, 924],
}
BASES = sorted({base for base, _ in FACTORS.values()} | {*TYPES["I"], *TYPES["II"]} - {1})


def dense(n):
    """The definition: (M_K ⊗ H_{2^p}) / √n with scipy's Sylvester matrix."""
    base, power = hadamard_factor(n)
    return np.kron(base_matrix(base), scipy.linalg.hadamard(2**power)) / np.sqrt(n)


@pytest.mark.parametrize(("n", "factor"), FACTORS.items())
def test_factorisation(n, factor):
    base, power = hadamard_factor(n)
    assert (base, 2**power) == factor
    assert is_hadamard_order(n)


@pytest.mark.parametrize("base", BASES)
def test_base_matrix_is_orthogonal_in_integers(base):
    matrix = base_matrix(base)
    assert matrix.shape == (base, base)
    assert set(np.unique(matrix)) <= {-1, 1}
    exact = matrix.astype(np.float64)  # integers far below 2^53: exact, and faster than an integer product
    np.testing.assert_array_equal(exact @ exact.T, base * np.eye(base))


@pytest.mark.parametrize("kind", ["I", "II"])
def test_paley_types(kind):
    assert {base: paley_type(base) for base in TYPES[kind]} == dict.fromkeys(TYPES[kind], kind)


@pytest.mark.parametrize("order", [92, 116, 156, 172, 10, 6])
def test_orders_without_a_paley_matrix(order):
    assert paley_type(order) is None
    with pytest.raises(InputError, match=f"order {order}"):
        paley_matrix(order)


def test_signs_of_the_type_one_matrix():
    """I + S with S skew: the diagonal is 1 and opposite entries differ."""
    matrix = base_matrix(28).astype(int)
    np.testing.assert_array_equal(matrix + matrix.T, 2 * np.eye(28))


def test_type_two_matrix_is_symmetric():
    np.testing.assert_array_equal(base_matrix(36), base_matrix(36).T)


@pytest.mark.parametrize(
    ("order", "digest"),
    [(28, "75a65a7a"), (36, "1a7aed2f"), (344, "4b40b391")],
)
def test_base_matrix_never_changes(order, digest):
    """Stored artifacts are decoded with these matrices, so another numbering of the field would break them."""
    assert hashlib.sha256(base_matrix(order).tobytes()).hexdigest()[:8] == digest


def test_base_matrix_is_cached_and_read_only():
    assert base_matrix(12) is base_matrix(12)
    with pytest.raises(ValueError, match="read-only"):
        base_matrix(12)[0, 0] = 0


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 32, 36, 64, 72, 96, 128, 576, 1024, 1536])
def test_transform_is_the_definition(n):
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    forward, backward = hadamard_transform(jnp.asarray(x)), hadamard_transform(jnp.asarray(x), transpose=True)
    np.testing.assert_allclose(forward, x @ dense(n), atol=4e-6)
    np.testing.assert_allclose(backward, x @ dense(n).T, atol=4e-6)


@pytest.mark.parametrize("n", sorted(FACTORS))
def test_transform_is_orthonormal_for_every_model_dimension(n):
    """Unit vectors go to rows of ±1/√n, distinct rows are orthogonal in integers, and the transpose inverts."""
    rows = np.unique(np.concatenate([[0, 1, n - 1], np.random.default_rng(n).integers(0, n, 5)]))
    units = np.zeros((len(rows), n), np.float32)
    units[np.arange(len(rows)), rows] = 1
    image = np.asarray(hadamard_transform(jnp.asarray(units)), np.float64)
    signs = np.rint(image * np.sqrt(n))
    np.testing.assert_allclose(image * np.sqrt(n), signs, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(signs), 1)
    np.testing.assert_array_equal(signs @ signs.T, n * np.eye(len(rows)))
    x = jnp.asarray(np.random.default_rng(n).standard_normal((2, n)), jnp.float32)
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(x), transpose=True), x, atol=1e-5)


def test_float64_is_exact_to_rounding():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 1376)))
        y = hadamard_transform(x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.asarray(x) @ dense(1376), atol=1e-13)
        np.testing.assert_allclose(hadamard_transform(y, transpose=True), x, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(n=st.sampled_from([12, 24, 40, 64]), seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_norms_and_inner_products_are_kept(n, seed, scale):
    x, y = (scale * np.random.default_rng(seed).standard_normal((2, n))).astype(np.float32)
    a, b = (np.asarray(hadamard_transform(jnp.asarray(v)), np.float64) for v in (x, y))
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    assert abs(a @ b - x.astype(float) @ y.astype(float)) <= 1e-5 * size


def test_works_under_vmap_and_keeps_dtype_and_batch_axes():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 24)), jnp.float32)
    np.testing.assert_allclose(jax.vmap(hadamard_transform)(x), hadamard_transform(x), atol=1e-6)
    half = hadamard_transform(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), hadamard_transform(x), atol=0.03)
    assert hadamard_transform(jnp.zeros((0, 24))).shape == (0, 24)


def test_bfloat16_input_is_accumulated_in_float32():
    """A sum of 4096 ones is 4096/√4096 exactly, out of reach for bfloat16 partial sums of mixed magnitude."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(4096), jnp.bfloat16)
    exact = np.asarray(hadamard_transform(x.astype(jnp.float32)))
    np.testing.assert_array_equal(np.asarray(hadamard_transform(x)), exact.astype(jnp.bfloat16))


def test_block_transform_is_independent_blocks():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 384)), jnp.float32)
    expected = np.concatenate([hadamard_transform(x[:, i : i + 128]) for i in (0, 128, 256)], axis=1)
    np.testing.assert_allclose(block_hadamard_transform(x), expected, atol=1e-6)
    np.testing.assert_allclose(
        block_hadamard_transform(block_hadamard_transform(x, 12), 12, transpose=True), x, atol=2e-6
    )


@pytest.mark.parametrize("block", [0, -128, 100, 768])
def test_block_must_divide(block):
    with pytest.raises(InputError, match=f"block {block} "):
        block_hadamard_transform(jnp.zeros((1, 384)), block)


@pytest.mark.parametrize(
    ("n", "following"), [(172, 176), (10920, 10944), (3, 4), (5, 8), (9, 12), (129, 132), (133, 136), (576, 576)]
)
def test_next_order(n, following):
    assert next_hadamard_order(n) == following
    assert not any(is_hadamard_order(k) for k in range(n, following))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20_000), multiple=st.sampled_from([1, 2, 3, 8, 16, 24, 48, 128]))
def test_next_order_of_a_multiple(n, multiple):
    order = next_hadamard_order(n, multiple)
    assert order >= n
    assert order % multiple == 0
    assert is_hadamard_order(order)
    assert order == n or not any(is_hadamard_order(k) for k in range(-(-n // multiple) * multiple, order, multiple))


@pytest.mark.parametrize("n", [172, 10920, 116 * 2 + 4, 6, 0, -4])
def test_dimension_without_a_matrix(n):
    assert not is_hadamard_order(n)
    with pytest.raises(InputError, match=f"dimension of {n};.*pad to .*kronecker"):
        hadamard_factor(n)


def test_multiple_that_no_order_has():
    with pytest.raises(InputError, match="divisible by 2017"):
        next_hadamard_order(100, 2017)
    for arguments in ((0, 1), (8, 0)):
        with pytest.raises(InputError, match="positive"):
            next_hadamard_order(*arguments)


def test_the_dense_factor_stays_small():
    assert all(hadamard_factor(n)[0] <= MAX_BASE for n in range(4, 60_000, 4) if is_hadamard_order(n))
