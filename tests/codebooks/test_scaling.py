"""Scales and zeros against a plain numpy GPTQ grid and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks
from qjax.codebooks.scaling import ScaleRule, fit
from qjax.errors import InputError


def weights(m=12, n=24, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32) * 0.03


@pytest.mark.parametrize(("granularity", "group"), [("matrix", None), ("row", None), ("group", 8)])
def test_rms_scaling_gives_the_codebook_its_rms(granularity, group):
    w = jnp.asarray(weights())
    book = codebooks.make("half_integer", 2)
    x = np.asarray(fit(w, book, ScaleRule("rms", granularity, group)).to_codebook_units(w))
    width = {"matrix": x.size, "row": 24, "group": 8}[granularity]
    rms = np.sqrt(np.mean(np.square(x.reshape(-1, width)), axis=-1))
    np.testing.assert_allclose(rms, book.rms, rtol=1e-3)  # float16 relative scales


@pytest.mark.parametrize("group", [16, 24, 32])
def test_the_rms_of_a_group_that_is_not_full_is_that_of_its_own_values(group):
    w, book = jnp.asarray(weights()), codebooks.make("half_integer", 2)
    scaling = fit(w, book, ScaleRule("rms", "group", group))
    x = np.asarray(scaling.to_codebook_units(w))
    for start in range(0, 24, group):
        rms = np.sqrt(np.mean(np.square(x[:, start : start + group]), axis=1))
        np.testing.assert_allclose(rms, book.rms, rtol=1e-3)
    assert scaling.relative.shape == (12, -(-24 // group))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_is_the_affine_grid_of_gptq(bits):
    w = weights() + 0.01
    scaling = fit(jnp.asarray(w), codebooks.make("grid", bits), ScaleRule("minmax", "row"))
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    found_scale, found_zero = scaling.at(jnp.arange(1), jnp.float32)
    np.testing.assert_allclose(np.asarray(found_scale)[:, 0], scale, rtol=6e-4)
    np.testing.assert_array_equal(np.asarray(found_zero)[:, 0], zero)


def test_shrunken_ranges_lower_the_error_they_are_chosen_by():
    w = np.random.default_rng(3).standard_t(3, (16, 64)).astype(np.float32)
    book = codebooks.make("grid", 3)

    def error(rule):
        scaling = fit(jnp.asarray(w), book, rule)
        values = scaling.from_codebook_units(book.dequantize(book.quantize(scaling.to_codebook_units(jnp.asarray(w)))))
        return np.sum(np.abs(np.asarray(values) - w) ** 2.4)

    assert error(ScaleRule("minmax", "row", shrink_steps=80)) < 0.9 * error(ScaleRule("minmax", "row"))


def test_to_and_from_codebook_units_are_inverse_with_ragged_groups():
    w = jnp.asarray(weights(5, 21))
    scaling = fit(w, codebooks.make("grid", 3), ScaleRule("minmax", "group", 8))
    np.testing.assert_allclose(scaling.from_codebook_units(scaling.to_codebook_units(w)), w, atol=1e-6)


def test_all_zero_rows_and_matrices_are_harmless():
    w = weights()
    w[3] = 0
    for rule in (ScaleRule("rms", "row"), ScaleRule("minmax", "row"), ScaleRule("rms")):
        book = codebooks.make("grid" if rule.method == "minmax" else "half_integer", 2)
        for matrix in (w, np.zeros_like(w)):
            assert np.all(np.isfinite(fit(jnp.asarray(matrix), book, rule).to_codebook_units(jnp.asarray(matrix))))


def test_the_outlier_of_one_row_does_not_reach_float16_limits():
    w = weights()
    w[0] *= 1e9
    scaling = jax.jit(lambda x: fit(x, codebooks.make("half_integer", 2), ScaleRule("rms", "row")))(jnp.asarray(w))
    assert np.all(np.isfinite(np.asarray(scaling.relative))) and np.all(np.asarray(scaling.relative) > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rsm"}, "scale.method"),
        ({"granularity": "column"}, "scale.granularity"),
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 8}, "group_size"),
        ({"granularity": "group", "group_size": 0}, "group_size is 0; it is a number of things, at least 1"),
        ({"rms": 0.0}, "scale.rms"),
        ({"method": "search", "candidates": ()}, "candidates"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ScaleRule(**options)


def test_minmax_needs_the_affine_grid():
    with pytest.raises(InputError, match="codebook=grid"):
        fit(jnp.asarray(weights()), codebooks.make("half_integer", 2), ScaleRule("minmax", "row"))
