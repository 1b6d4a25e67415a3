"""Element formats against ml_dtypes exhaustively, and against rational arithmetic where it does not have them."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.errors import InputError
from qjax.formats.rounding import ROUNDINGS, magnitude, round_magnitude

BFLOAT16 = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
FINITE = BFLOAT16[np.isfinite(BFLOAT16)]
THEIRS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
OPTIONS = {
    "float": {"exponent_bits": 4, "mantissa_bits": 3, "specials": "none"},
    "fixed": {"word_bits": 7, "fraction_bits": 3},
    "block_float": {"bits": 6, "block": 16},
}


def cast(x, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(dtype).astype(np.float32)


def float32s(count, seed=0):
    """Random bit patterns of float32: all magnitudes, subnormals too."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)
    x = bits.view(np.float32)
    return x[np.isfinite(x)]


def with_ties(dtype):
    """All numbers of a type of at most 16 bits, the midpoints of neighbours, and the float32 beside these."""
    width = np.dtype(dtype).itemsize * 8
    values = cast(np.arange(2**width).astype(f"uint{width}").view(dtype), np.float64).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([values.astype(np.float32), middle, *beside])


@pytest.mark.parametrize("name", THEIRS)
def test_ml_dtypes_agrees_on_every_bfloat16_every_tie_and_float32_of_all_sizes(name):
    dtype = THEIRS[name]
    own = formats.make(name)
    x = np.concatenate([FINITE, float32s(100_000), np.unique(with_ties(dtype))])
    if name == "e8m0":  # there ml_dtypes gives 2^-126 for all above 2^-127: no nearest (the test below)
        x = x[(x <= 2.0**-127) | (x >= 2.0**-126)]
    top = float(ml_dtypes.finfo(dtype).max)
    clipped = np.clip(x, -top, top) if own.keeps and name in ("e4m3", "e5m2", "e3m4") else x  # casts do not saturate
    np.testing.assert_array_equal(np.asarray(own.quantize(x)), cast(clipped, dtype))


def test_the_smallest_scales_are_rounded_to_the_nearest():
    """As all others are, and unlike ml_dtypes."""
    x = np.array([1, 1.25, 1.5, 1.75, 2], np.float32) * np.float32(2.0**-127)
    np.testing.assert_array_equal(formats.make("e8m0").quantize(x), np.float32([1, 1, 2, 2, 2]) * np.float32(2.0**-127))
    np.testing.assert_array_equal(cast(x, THEIRS["e8m0"]), np.float32([1, 2, 2, 2, 2]) * np.float32(2.0**-127))


@pytest.mark.parametrize(("name", "overflow"), [("e4m3", "nan"), ("e5m2", "infinity"), ("e3m4", "infinity")])
def test_without_saturation_the_casts_of_ml_dtypes_come_out(name, overflow):
    found = formats.make(name, overflow=overflow).quantize(BFLOAT16)
    np.testing.assert_array_equal(np.asarray(found), cast(BFLOAT16, THEIRS[name]))


def test_all_levels_and_codes_are_those_of_ml_dtypes():
    for name in ("e4m3", "e5m2", "e3m4", "e2m1", "e2m3", "e3m2"):
        form, dtype = formats.make(name), THEIRS[name]
        codes = np.arange(2**form.bits, dtype=np.uint8)
        theirs = codes.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(form.levels(), theirs)
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(np.asarray(form.encode(jnp.asarray(theirs[finite]))), codes[finite])
        assert form.largest[0] * 2.0 ** form.largest[1] == theirs[finite].max()


def rational(x, mantissa, least, largest, rounding):
    """The rounded magnitude of a float, in rational arithmetic."""
    value, step = abs(Fraction(float(x))), Fraction(2) ** least
    if mantissa is not None:
        step = max(step, Fraction(2) ** (math.frexp(x)[1] - 1 - mantissa))
    k, rest = divmod(value, step)
    up = {
        "nearest": rest * 2 > step or (rest * 2 == step and k % 2 == 1),
        "nearest_away": rest * 2 >= step,
        "nearest_down": rest * 2 > step,
        "toward_zero": False,
    }[rounding]
    return min((k + up) * step, largest)


@pytest.mark.parametrize(
    ("name", "options", "mantissa", "least", "largest"),
    [
        ("float", {"exponent_bits": 4, "mantissa_bits": 3, "specials": "none"}, 3, -9, Fraction(480)),  # QPyTorch's
        ("float", {"exponent_bits": 6, "mantissa_bits": 1}, 1, -31, Fraction(3 * 2**30)),
        ("fixed", {"word_bits": 7, "fraction_bits": 3, "symmetric": True}, None, -3, Fraction(63, 8)),
    ],
)
def test_rational_arithmetic_agrees_on_every_bfloat16(name, options, mantissa, least, largest):
    form = formats.make(name, **options)
    scale = 2.0 ** (-least)
    numbers = FINITE[(FINITE >= 0) & (4 * float(largest) > FINITE)]  # beyond it saturates, as the last of them do
    sample = numbers[numbers * scale > 2.0**-3]
    tiny = numbers[numbers * scale <= 2.0**-3]
    for rounding in ROUNDINGS[:-1]:
        expected = [float(rational(x, mantissa, least, largest, rounding)) for x in sample]
        for sign in (1, -1):
            np.testing.assert_array_equal(np.asarray(form.quantize(sign * sample, rounding)), sign * np.array(expected))
        assert not np.asarray(form.quantize(tiny, rounding)).any()
        assert (np.asarray(form.quantize(FINITE[2 * float(largest) < FINITE], rounding)) == float(largest)).all()


@pytest.mark.parametrize("widths", [(4, 3), (8, 5), (5, 17), (2, 0), (8, 23)])
def test_a_million_float32_round_as_they_do_in_float64(widths):
    exponent, mantissa = widths
    form = formats.make("float", exponent_bits=exponent, mantissa_bits=mantissa)
    x = np.concatenate([float32s(500_000), np.random.default_rng(1).standard_normal(500_000).astype(np.float32)])
    wide = x.astype(np.float64)
    _, e = np.frexp(wide)
    step = np.ldexp(1.0, np.maximum(e - 1 - mantissa, form.least))
    top = form.largest[0] * 2.0 ** form.largest[1]
    if mantissa:  # with one significant bit a tie has no even neighbour
        np.testing.assert_array_equal(np.asarray(form.quantize(x)), np.clip(np.rint(wide / step) * step, -top, top))
    np.testing.assert_array_equal(
        np.asarray(form.quantize(x, "toward_zero")), np.clip(np.trunc(wide / step) * step, -top, top)
    )


@pytest.mark.parametrize(("least", "mantissa"), [(-9, 3), (-133, 7), (-3, None), (-16, 2)])
def test_the_probability_of_rounding_up_is_the_discarded_fraction(least, mantissa):
    """Up for exactly the words below fraction · 2^32: no sampling, the two words about it decide."""
    x = np.abs(float32s(60_000, 5))
    x = x[x < 2.0 ** (least + 40)]
    x = np.concatenate([x, np.abs(np.random.default_rng(2).standard_normal(4000)).astype(np.float32)])
    wide = x.astype(np.float64)
    _, e = np.frexp(wide)
    step = np.ldexp(1.0, np.full(x.shape, least) if mantissa is None else np.maximum(e - 1 - mantissa, least))
    low = np.floor(wide / step) * step
    threshold = np.floor((wide / step - np.floor(wide / step)) * 2.0**32).astype(np.uint64)
    bits = magnitude(jnp.asarray(x))
    up = {}
    for name, words in (("below", np.maximum(threshold, 1) - 1), ("at", threshold)):
        found = round_magnitude(bits, least, mantissa, "stochastic", jnp.asarray(words.astype(np.uint32)))
        up[name] = np.asarray(found).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(up["at"], low)
    np.testing.assert_array_equal(up["below"], np.where(threshold > 0, low + step, low))


def test_stochastic_rounding_is_unbiased_and_depends_on_its_key_alone():
    x = np.full((2**16,), 1.0 + 3 / 64, np.float32)  # 3/8 of the way from 1 to 1.125
    form = formats.make("e4m3")
    drawn = np.asarray(form.quantize(x, "stochastic", jax.random.key(3)))
    assert set(drawn) == {1.0, 1.125}
    assert abs((drawn == 1.125).mean() - 3 / 8) < 4.5 * np.sqrt(3 / 8 * 5 / 8 / x.size)
    np.testing.assert_array_equal(drawn, form.quantize(x, "stochastic", jax.random.key(3)))
    assert (drawn != np.asarray(form.quantize(x, "stochastic", jax.random.key(4)))).any()


def test_fixed_point_clamps_and_wraps():
    x = np.array([-9.0, -8.1, -8.0, 7.9, 7.96875, 8.0, 23.5, 1e9, -3.0625, 0.0625, 0.1875], np.float32)
    clamp, wrap = (formats.make("fixed", word_bits=7, fraction_bits=3, overflow=how) for how in ("clamp", "wrap"))
    k = np.rint(x.astype(np.float64) * 8)
    np.testing.assert_array_equal(np.asarray(clamp.quantize(x)), np.clip(k, -64, 63) / 8)
    np.testing.assert_array_equal(np.asarray(wrap.quantize(x)), ((k + 64) % 128 - 64) / 8)
    symmetric = formats.make("fixed", word_bits=7, fraction_bits=3, symmetric=True)
    assert float(symmetric.quantize(x)[0]) == -63 / 8
    one = formats.make("fixed", word_bits=1, fraction_bits=0)
    np.testing.assert_array_equal(np.asarray(one.quantize(np.array([-3.0, -0.4, 2.0], np.float32))), [-1, 0, 0])


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_every_format_is_a_projection(name):
    form = formats.make(name, **OPTIONS.get(name, {}))
    hash(form)
    x = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    x = np.abs(x) if name == "e8m0" else x
    found = np.asarray(form.quantize(x))
    if name != "ternary":  # whose scale is a mean of what it rounds
        np.testing.assert_allclose(np.asarray(form.quantize(found)), found, rtol=1e-6)
    assert form.bits_of((3, 64)) >= 3 * 64 * int(form.bits)


@pytest.mark.parametrize("name", ["e4m3", "block_float", "mxfp4", "nvfp4", "nf4"])  # a class each
def test_formats_work_under_jit_vmap_and_grad(name):
    form = formats.make(name, **OPTIONS.get(name, {}))
    x = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    found = np.asarray(form.quantize(x))
    np.testing.assert_array_equal(np.asarray(jax.jit(form.quantize)(x)), found)
    per_row = name == "nvfp4"  # which has a scale for the whole array
    np.testing.assert_array_equal(
        np.asarray(jax.vmap(form.quantize)(x)), np.stack([form.quantize(row) for row in x]) if per_row else found
    )
    _, back = jax.vjp(form.quantize, jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(back(jnp.asarray(x))[0]), x)  # straight through
    assert not np.asarray(form.quantize(np.zeros((3, 64), np.float32))).any()
    assert form.quantize(x[:, :0]).shape == (3, 0)
    noisy = form.quantize(x, "stochastic", jax.random.key(0))
    assert bool(jnp.all(jnp.isfinite(noisy))) and bool(jnp.any(noisy != found))


def test_half_precision_inputs_are_the_same_numbers():
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    form = formats.make("bfloat16")
    np.testing.assert_array_equal(np.asarray(form.quantize(jnp.asarray(x))), x.astype(np.float32))
    gradient = jax.grad(lambda x: form.quantize(x).sum())(jnp.asarray(x))
    assert gradient.dtype == jnp.bfloat16 and bool(jnp.all(gradient == 1))


def test_kahan_keeps_what_nearest_loses():
    updates = np.full((4096,), 2.0**-12, np.float32)
    form = formats.make("bfloat16")
    total = float(formats.kahan_sum(jnp.concatenate([jnp.ones(1, jnp.float32), jnp.asarray(updates)]), form))
    assert total == 2.0
    plain, _ = jax.lax.scan(lambda w, u: (form.quantize(w + u), None), jnp.float32(1), jnp.asarray(updates))
    assert float(plain) == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("float", {"exponent_bits": 9, "mantissa_bits": 3}, "1 to 8 exponent bits"),
        ("float", {"exponent_bits": 4, "mantissa_bits": 24}, "0 to 23 mantissa bits"),
        ("float", {"exponent_bits": 1, "mantissa_bits": 2}, "2 at least with specials=ieee"),
        ("float", {"exponent_bits": 8, "mantissa_bits": 3, "specials": "none"}, "outside of float32"),
        (
            "float",
            {"exponent_bits": 4, "mantissa_bits": 3, "specials": "nan", "overflow": "infinity"},
            "no code for it",
        ),
        ("float", {"exponent_bits": 0, "mantissa_bits": 3}, "exponent_bits is 0"),
        ("fixed", {"word_bits": 25, "fraction_bits": 3}, "1 to 24 word bits"),
        ("fixed", {"word_bits": 8, "fraction_bits": 3, "overflow": "wrap", "symmetric": True}, "symmetric=false"),
        ("block_float", {"bits": 1}, "2 to 24"),
        ("block_float", {"bits": 4, "block": "line"}, "block"),
        ("mxfp4", {"scale_rule": "best"}, "scale_rule.*floor"),
        ("nf4", {"block": 1}, "use 64"),
        ("mxfp5", {}, "did you mean mxfp"),
    ],
)
def test_formats_that_cannot_exist_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        formats.make(name, **options)


def test_what_a_format_cannot_hold_is_refused_outside_of_jit_and_stays_nan_inside():
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.nan
    for name in ("e2m1", "mxfp4", "nvfp4", "nf4", "mxint8"):
        form = formats.make(name)
        with pytest.raises(InputError, match=rf"w holds nan at \(1, 3\), and format '{name}' has no code"):
            form.quantize(x, name="w")
        inside = np.asarray(jax.jit(form.quantize)(x))
        assert np.isnan(inside[1, 3])
        assert name == "nvfp4" or np.isfinite(inside[0]).all()
    assert np.isnan(np.asarray(formats.make("e4m3").quantize(x))[1, 3])


def test_bad_calls_are_refused():
    form = formats.make("e2m1")
    with pytest.raises(InputError, match="weight is float64"):
        form.quantize(np.ones(3), name="weight")
    with pytest.raises(InputError, match="x is int32"):
        form.quantize(jnp.arange(3, dtype=jnp.int32))
    with pytest.raises(InputError, match="needs key=jax.random.key"):
        form.quantize(np.ones(3, np.float32), "stochastic")
    with pytest.raises(InputError, match="did you mean 'nearest'"):
        form.quantize(np.ones(3, np.float32), "neerest")
