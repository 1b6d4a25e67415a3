"""Formats with shared scales against numpy with ml_dtypes; conventions of other tools where guesses go wrong."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import formats
from qjax.errors import InputError

ELEMENTS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2, 6.0),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
}


def weights(shape=(40, 96), seed=0):
    """Blocks of very different size, some of them zero, some with one value alone."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, shape) * np.exp2(rng.integers(-30, 30, (shape[0], 1)))
    x[3], x[5] = 0, 0
    x[5, 17] = 3.0
    return x.astype(np.float32)


def mx(x, name, rule):
    """OCP's rules in float64, elements by ml_dtypes."""
    dtype, emax, top = ELEMENTS[name]
    blocks = x.astype(np.float64).reshape(-1, 32)
    amax = np.abs(blocks).max(1)
    safe = np.where(amax > 0, amax, 1)
    if rule == "ceil":
        s = np.ceil(np.log2(safe / top))
    elif rule == "even":
        mantissa, e = np.frexp(safe)
        bits = ml_dtypes.finfo(dtype).nmant
        s = e - 1 + (np.floor(mantissa * 2 ** (bits + 1) + 0.5) >= 2 ** (bits + 1)) - emax
    else:
        s = np.floor(np.log2(safe)) - emax
    scale = np.exp2(np.where(amax > 0, s, -127))[:, None]
    return (np.clip(blocks / scale, -top, top).astype(np.float32).astype(dtype).astype(np.float64) * scale).reshape(
        x.shape
    )


@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_microscaling_is_what_ml_dtypes_makes_of_scaled_and_clipped_blocks(name, rule):
    x = weights()
    found = np.asarray(formats.make(name, scale_rule=rule).quantize(x))
    np.testing.assert_array_equal(found, mx(x, name, rule))


def test_mxint8_is_a_grid_of_1_64():
    x = weights()
    blocks = x.astype(np.float64).reshape(-1, 32)
    amax = np.abs(blocks).max(1, keepdims=True)
    scale = np.exp2(np.floor(np.log2(np.where(amax > 0, amax, 1))))
    expected = (np.clip(np.rint(blocks / scale * 64), -127, 127) / 64 * scale).reshape(x.shape)
    np.testing.assert_array_equal(np.asarray(formats.make("mxint8").quantize(x)), expected)


@pytest.mark.parametrize(
    ("amax", "floor", "even", "ceil"),
    [
        (7.0, 127, 128, 128),  # gguf, torchao, auto-round: 127; compressed-tensors: 128; qwix, modelopt: 128
        (6.0, 127, 127, 127),
        (6.5, 127, 127, 128),
        (6.99, 127, 127, 128),
        (4.0, 127, 127, 127),
        (3.5, 126, 127, 127),
        (1.0, 125, 125, 125),
    ],
)
def test_the_scale_byte_of_a_block_is_that_of_each_tool(amax, floor, even, ceil):
    x = np.zeros((1, 32), np.float32)
    x[0, 7] = -amax
    found = {
        rule: formats.make("mxfp4", scale_rule=rule).scale_codes(jnp.asarray(x)) for rule in ("floor", "even", "ceil")
    }
    assert {rule: int(code[0, 0]) for rule, code in found.items()} == {"floor": floor, "even": even, "ceil": ceil}


def test_ties_of_elements_go_to_even_or_down():
    """To even: OCP and ml_dtypes; towards zero: gguf, modelopt's MXFP4."""
    x = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4], np.float32)
    form = formats.make("mxfp4")
    np.testing.assert_array_equal(form.quantize(x)[0, :8], [0, 1, 1, 2, 2, 4, 4, 6])
    np.testing.assert_array_equal(form.quantize(x, "nearest_down")[0, :8], [0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_the_best_of_three_scales_is_the_best():
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    error = {}
    for rule in ("floor", "even", "ceil", "mse"):
        found = np.asarray(formats.make("mxfp4", scale_rule=rule).quantize(x))
        error[rule] = np.square(found.astype(np.float64) - x).reshape(-1, 32).sum(1)
    tried = []
    for shift in (-1, 0, 1):
        s = np.exp2(np.floor(np.log2(np.abs(x).reshape(-1, 32).max(1))) - 2 + shift)[:, None]
        blocks = x.reshape(-1, 32)
        values = np.clip(blocks / s, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * s
        tried.append(np.square(values - blocks).sum(1))
    np.testing.assert_allclose(error["mse"], np.min(tried, axis=0), rtol=1e-5)
    for rule, published in (("floor", 0.01322), ("ceil", 0.01332), ("even", 0.01251), ("mse", 0.01245)):
        assert error[rule].sum() / np.square(x).sum() == pytest.approx(published, rel=0.03)


def test_extreme_blocks_stay_exact():
    """Blocks at both ends of float32, subnormals too: no flushing, no overflow of the scale."""
    for size in (2.0**-130, 2.0**-135, 2.0**127, 2.0**-100):
        x = np.zeros((1, 32), np.float32)
        x[0, :3] = np.float32(size), -np.float32(size), np.float32(size) / 2
        np.testing.assert_array_equal(np.asarray(formats.make("mxfp8_e4m3").quantize(x)), x)


def test_nvfp4_is_two_scales_of_which_the_tensors_is_amax_over_2688():
    x = weights((16, 64), 3)
    x[:, :] = np.random.default_rng(3).standard_normal((16, 64)) * 0.02
    x[2, 16:32] = 0
    unit = np.float32(np.abs(x).max() / np.float32(2688))
    blocks = x.reshape(-1, 16)
    scale = (np.abs(blocks).max(1) / (unit * np.float32(6))).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    both = (np.maximum(scale, np.float32(2**-9)) * unit)[:, None]
    expected = (blocks / both).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * both
    np.testing.assert_array_equal(np.asarray(formats.make("nvfp4").quantize(x)), expected.reshape(x.shape))
    assert scale.max() == 448


def test_nvfp4_without_a_tensor_scale_loses_small_weights_and_refuses_large_ones():
    x = np.full((1, 16), 2.0**-12, np.float32)
    alone = formats.make("nvfp4", tensor_scale=False)
    assert not np.asarray(alone.quantize(x)).any() and np.asarray(formats.make("nvfp4").quantize(x)).all()
    with pytest.raises(InputError, match="w reaches 3000.*use tensor_scale=true"):
        alone.quantize(np.full((1, 16), 3000, np.float32), name="w")


def test_the_searched_scale_of_nvfp4_is_never_worse():
    x = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    errors = []
    for rule in ("nearest", "mse"):
        found = np.asarray(formats.make("nvfp4", scale_rule=rule).quantize(x))
        errors.append(np.square(found - x).reshape(-1, 16).sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < 0.92 * errors[0].sum()
    assert errors[0].sum() / np.square(x).sum() == pytest.approx(0.00903, rel=0.03)


@pytest.mark.parametrize("block", ["tensor", "row", "column", 8])
def test_block_floating_point_is_that_of_the_shared_exponent(block):
    x = weights((8, 20), 5)[:, :20]
    axis = {"tensor": None, "row": 1, "column": 0}.get(block)
    if block == 8:  # 20 values are blocks of 8, 8 and 4
        padded = np.pad(x.astype(np.float64), ((0, 0), (0, 4))).reshape(8, 3, 8)
        amax = np.repeat(np.abs(padded).max(2), 8, axis=1)[:, :20]
    else:
        amax = np.abs(x.astype(np.float64)).max(axis=axis, keepdims=True)
    step = np.exp2(np.floor(np.log2(np.where(amax > 0, amax, 1))) + 2 - 6)
    expected = np.clip(np.rint(x / step), -31, 31) * step
    form = formats.make("block_float", bits=6, block=block)
    np.testing.assert_array_equal(np.asarray(form.quantize(x)), expected)
    assert form.bits_of((8, 20)) == {"tensor": 968, "row": 1024, "column": 1120, 8: 8 * (24 * 6 + 3 * 8)}[block]


def test_tables_are_the_nearest_levels_of_bitsandbytes():
    x = np.random.default_rng(6).standard_normal((4, 150)).astype(np.float32)
    for name, levels in (("nf4", formats.tables.NF4), ("fp4", formats.tables.FP4)):
        form = formats.make(name)
        found = np.asarray(form.quantize(x))
        padded = np.pad(x, ((0, 0), (0, 42))).reshape(4, 3, 64)
        scale = np.abs(padded).max(2, keepdims=True)
        table = np.asarray(levels, np.float32)
        nearest = table[np.abs(padded[..., None] / scale[..., None] - table).argmin(-1)] * scale
        np.testing.assert_allclose(found, nearest.reshape(4, 192)[:, :150], rtol=1e-6)
        assert form.bits_of(x.shape) == 4 * (192 * 4 + 3 * 32)
    assert set(np.abs(formats.tables.FP4)) != set(np.abs(formats.make("e2m1").levels()) / 6)  # no E2M1


def test_ternary_is_a_rounded_multiple_of_the_mean_magnitude():
    x = np.random.default_rng(7).standard_normal((6, 50)).astype(np.float32)
    scale = np.abs(x).mean()
    found = np.asarray(formats.make("ternary").quantize(x))
    np.testing.assert_allclose(found, np.clip(np.rint(x / scale), -1, 1) * scale, rtol=1e-6)
    ragged = np.asarray(formats.make("ternary", block=32).quantize(x))  # the last block has 18 values
    np.testing.assert_allclose(np.abs(ragged[:, 32:]).max(1), np.abs(x[:, 32:]).mean(1), rtol=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "nf4"])
def test_stochastic_rounding_of_blocks_is_unbiased_between_neighbours(name):
    x = np.tile(np.linspace(-0.95, 0.9, 64, dtype=np.float32), (4096, 1))
    x[:, ::16] = 1.5  # so that no value saturates
    form = formats.make(name)
    drawn = np.asarray(form.quantize(x, "stochastic", jax.random.key(1))).astype(np.float64)
    spread = drawn.std(0) / np.sqrt(len(x))
    np.testing.assert_array_less(np.abs(drawn.mean(0) - x[0]), 5 * spread + 1e-6)


def test_padding_is_counted():
    assert formats.make("mxfp4").bits_of((3, 33)) == 3 * (64 * 4 + 2 * 8)
    assert formats.make("nvfp4").bits_of((3, 33)) == 3 * (48 * 4 + 3 * 8) + 32
    x = np.random.default_rng(0).standard_normal((3, 33)).astype(np.float32)
    whole = formats.make("mxfp4").quantize(np.pad(x, ((0, 0), (0, 31))))
    np.testing.assert_array_equal(formats.make("mxfp4").quantize(x), whole[:, :33])
