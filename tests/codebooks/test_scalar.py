"""Scalar codebooks against brute force, and against published Gaussian distortions (algorithms.md 4.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks
from qjax.codebooks.gaussian import distortion, lloyd_max_levels, optimal_rms
from qjax.errors import InputError

NAMES = ("grid", "half_integer", "quip_grid", "lloyd_max")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_levels(name, bits):
    book = codebooks.make(name, bits)
    levels = np.asarray(book.levels, np.float64)
    spread = levels.max() - levels.min() + 1
    x = (np.random.default_rng(bits).random((31, 47)) * 1.4 - 0.2) * spread + levels.min()
    x = x.astype(np.float32)
    codes = np.asarray(book.quantize(jnp.asarray(x)))
    nearest = np.min(np.abs(x[..., None] - levels), axis=-1)
    values = np.asarray(book.dequantize(jnp.asarray(codes)))
    np.testing.assert_allclose(np.abs(x - values), nearest, atol=2e-6 * spread)
    np.testing.assert_allclose(values, levels[codes], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lloyd_max", (0.3634, 0.1175, 0.03455, 0.00950)),
        ("half_integer", (0.3634, 0.1188, 0.03744, 0.01154)),
        ("quip_grid", (2.93, 0.2146, 0.0419, 0.0117)),
    ],
)
def test_closed_form_gaussian_distortion_is_the_published_one(name, expected):
    for bits, value in enumerate(expected, start=1):
        book = codebooks.make(name, bits)
        found = distortion(np.asarray(book.levels, np.float64) / book.rms)
        assert found == pytest.approx(value, rel=4e-3), (bits, found)


def test_measured_gaussian_distortion_agrees_with_the_closed_form():
    x = np.random.default_rng(0).standard_normal((400, 1000)).astype(np.float32)
    for name in ("half_integer", "lloyd_max"):
        book = codebooks.make(name, 2)
        values = np.asarray(book.dequantize(book.quantize(jnp.asarray(x * np.float32(book.rms))))) / book.rms
        squared = np.square(x - values)
        error = np.std(squared) / math.sqrt(x.size)
        closed = distortion(np.asarray(book.levels, np.float64) / book.rms)
        assert abs(np.mean(squared) - closed) < 4 * error


def test_published_optimal_scales():
    found = [codebooks.make("half_integer", bits).rms for bits in (1, 2, 3, 4)]
    assert found == pytest.approx([0.63, 1.005, 1.71, 2.985], abs=6e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_lloyd_max_levels_are_centroids_of_their_cells(bits):
    levels = np.asarray(lloyd_max_levels(bits))
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_allclose(levels, -levels[::-1])
    best = distortion(levels)
    for shift in (0.999, 1.001):  # a fixed point: no common factor improves it
        assert distortion(levels * shift) > best
    assert optimal_rms(levels) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_is_unbiased_inside_the_range(name):
    book = codebooks.make(name, 3)
    levels = np.asarray(book.levels, np.float32)
    x = np.linspace(levels[0], levels[-1], 9, dtype=np.float32)[None, :].repeat(20_000, axis=0)
    codes = book.quantize_stochastic(jnp.asarray(x), jax.random.key(1))
    mean = np.asarray(book.dequantize(codes)).mean(axis=0)
    step = np.max(np.diff(levels))
    np.testing.assert_allclose(mean, x[0], atol=4 * step / 2 / math.sqrt(20_000))


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_widths_that_do_not_exist_are_refused(bits):
    with pytest.raises(InputError, match="1 to 8 whole bits"):
        codebooks.make("half_integer", bits)


def test_unknown_names_and_options_list_what_exists():
    with pytest.raises(InputError, match="half_integer"):
        codebooks.make("half_int", 2)
    with pytest.raises(InputError, match="its options are: rms"):
        codebooks.make("grid", 2, groups=3)
