"""D4: 256 points, exact nearest points against brute force, Gaussian distortion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.codebooks import CODEBOOKS, Codebook, make
from qjax.errors import InputError

QUANTIZE = jax.jit(lambda book, x: book.quantize(x))
DEQUANTIZE = jax.jit(lambda book, codes: book.dequantize(codes))

POINTS = np.asarray(
    [
        p
        for p in itertools.product(np.arange(-2.5, 3), repeat=4)
        if sum(p) % 2 == 0 and sum(v * v for v in p) <= 9
    ]
)  # fmt: skip


def chosen_distance(x: np.ndarray, rms: float | None = None) -> np.ndarray:
    book = make("d4", 2, rms=rms)
    values = np.asarray(DEQUANTIZE(book, QUANTIZE(book, x)), np.float64)
    return ((values - x) ** 2).reshape(-1, 4).sum(axis=1)


def brute_force_distance(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return ((POINTS**2).sum(axis=1) - 2 * x @ POINTS.T).min(axis=1) + (x**2).sum(axis=1)


def test_codes_are_the_256_points_of_the_ball():
    assert len(POINTS) == 256
    book = make("d4", 2)
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    points = np.asarray(DEQUANTIZE(book, codes)).reshape(-1, 4)
    assert {tuple(p) for p in points.tolist()} == {tuple(p) for p in POINTS.tolist()}
    assert np.array_equal(QUANTIZE(book, points), codes.reshape(256, 1))
    # The layout: magnitudes ascend lexicographically in the upper five bits, the signs of three coordinates lie below.
    magnitudes = [tuple(p) for p in abs(points[::8]).tolist()]
    assert magnitudes == sorted(set(magnitudes)) and len(magnitudes) == 32
    assert np.array_equal(points[:, :3] < 0, (np.arange(256)[:, None] >> np.arange(3)) & 1 == 1)


def test_nearest_point_equals_brute_force():
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(120_000, 4)) * np.repeat([0.4, 1.21, 3.0], 40_000)[:, None]).astype(np.float32)
    assert np.allclose(chosen_distance(x), brute_force_distance(x), rtol=1e-6, atol=1e-5)


def test_ties_are_exact():
    x = np.asarray(list(itertools.product(np.arange(-3, 3.25, 0.5), repeat=4)), np.float32)
    assert np.array_equal(chosen_distance(x), brute_force_distance(x))


def test_distortion_of_a_gaussian():
    x = np.random.default_rng(1).normal(size=(2000, 1600)).astype(np.float32)

    def distortion(rms: float) -> np.ndarray:
        return chosen_distance(x * np.float32(rms), rms) / (4 * rms**2)

    errors = distortion(1.21)
    assert abs(errors.mean() - 0.1030) < 0.007 * 0.1030
    assert errors.std() / len(errors) ** 0.5 < 0.0015 * 0.1030
    assert errors.mean() < min(distortion(1.15).mean(), distortion(1.27).mean())


def test_packing_vmap_and_contract():
    book = make("d4", 2)
    assert isinstance(book, Codebook) and "d4" in CODEBOOKS
    assert (book.bits, book.tile, book.rms) == (2, (1, 4), 1.21)
    assert make(**book.spec()) == book and hash(make(**book.spec())) == hash(book)
    x = np.random.default_rng(2).normal(size=(2, 5, 12)).astype(np.float32)
    codes = jax.jit(jax.vmap(book.quantize))(x)
    assert codes.shape == (2, 5, 3) and codes.dtype == jnp.uint8
    assert np.array_equal(codes[1], QUANTIZE(book, x[1]))
    packed = book.pack(codes[0])
    assert packed.size == 4  # 120 bits
    assert packed.tobytes()[:15] == np.asarray(codes[0]).tobytes()
    assert np.array_equal(book.unpack(packed, (5, 12)), codes[0])


def test_what_does_not_exist_is_refused():
    with pytest.raises(
        InputError, match="'d4' has 2 bits per weight, not 1; codebooks with 1 bits: e81b, half_integer"
    ):
        make("d4", 1)
    with pytest.raises(InputError, match="codes 4 columns of a row together, found a matrix of 2×6"):
        make("d4", 2).quantize(jnp.zeros((2, 6)))
