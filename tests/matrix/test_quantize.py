"""The composition for one matrix: what it reports, what it stores, and what it refuses."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import codebooks, incoherence, rounding
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import ArtifactError, InputError, NumericsError
from qjax.interchange.serialize import from_arrays, to_arrays


def problem(m=48, n=64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 16))
    return (rng.standard_normal((m, n)) * 0.02).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def quantize(w, h, *, book="half_integer", bits=2, algorithm="ldlq", rotation="hadamard", output=None, **options):
    return qjax.quantize_matrix(
        w,
        qjax.Hessian(h, output),
        codebook=codebooks.make(book, bits),
        rounding=rounding.make(algorithm),
        incoherence=incoherence.make(rotation),
        key=jax.random.key(3),
        **options,
    )


@pytest.mark.parametrize("rotation", ["none", "hadamard", "block_hadamard", "kronecker"])
@pytest.mark.parametrize(("m", "n"), [(48, 64), (40, 172)])
def test_matrix_and_report_agree(rotation, m, n):
    w, h = problem(m, n)
    matrix, report = quantize(w, h, rotation=rotation)
    dense = np.asarray(matrix.dequantize(), np.float64)
    error = w - dense
    loss = np.trace(error @ h @ error.T) / np.trace(w.astype(np.float64) @ h @ w.T)
    assert report.proxy_loss == pytest.approx(loss, rel=1e-4)
    assert report.weight_mse == pytest.approx(np.sum(error**2) / np.sum(w.astype(np.float64) ** 2), rel=1e-4)
    assert report.shape == matrix.shape == (m, n) and report.damping == pytest.approx(0.01)
    for rows in (5, 100):  # few rows are rotated themselves, many are multiplied by the rotated matrix
        x = np.random.default_rng(1).standard_normal((3, rows, n)).astype(np.float32)
        np.testing.assert_allclose(matrix.matmul(jnp.asarray(x)), x @ dense.T.astype(np.float32), atol=2e-5)


@pytest.mark.parametrize("algorithm", ["ldlq", "yaqa"])
@pytest.mark.parametrize("exponent", [-120, -70, 70, 118])
def test_the_scale_of_the_hessian_changes_nothing_over_the_range_of_float32(exponent, algorithm):
    w, h = problem()
    output = np.cov(np.random.default_rng(2).standard_normal((48, 200))).astype(np.float32)
    output = output if algorithm == "yaqa" else None
    matrix, report = quantize(w, h, algorithm=algorithm, output=output)
    scale = lambda x: None if x is None else np.ldexp(x, exponent)  # noqa: E731
    other, found = quantize(w, scale(h), algorithm=algorithm, output=scale(output))
    np.testing.assert_array_equal(other.packed, matrix.packed)
    np.testing.assert_array_equal(other.dequantize(), matrix.dequantize())
    same = {name: value for name, value in dataclasses.asdict(found).items() if name != "seconds"}
    assert same == {name: value for name, value in dataclasses.asdict(report).items() if name != "seconds"}


@pytest.mark.parametrize("exponent", [-90, -45, 40])
def test_the_reports_of_small_and_large_weights_are_those_of_usual_ones(exponent):
    w, h = problem()
    matrix, report = quantize(w, h)
    other, found = quantize(np.ldexp(w, exponent), h)
    np.testing.assert_array_equal(other.packed, matrix.packed)
    np.testing.assert_array_equal(other.dequantize(), np.ldexp(np.asarray(matrix.dequantize()), exponent))
    assert found.proxy_loss == report.proxy_loss and found.weight_mse == report.weight_mse
    assert found.squared_error == report.squared_error * 4.0**exponent
    assert found.kronecker_loss == report.kronecker_loss * 4.0**exponent


def test_a_plain_hessian_in_float64_may_be_larger_than_float32():
    w, h = problem()
    options = {"codebook": ("half_integer", 2), "rounding": "ldlq", "incoherence": None, "key": 3}
    _, report = qjax.quantize_matrix(w, h, **options)
    _, found = qjax.quantize_matrix(w, np.ldexp(h.astype(np.float64), 300), **options)
    assert found.proxy_loss == report.proxy_loss > 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bits_per_weight_count_everything_that_is_stored(bits):
    w, h = problem(40, 172)  # 172 has no Hadamard matrix here and is padded to 176
    matrix, report = quantize(w, h, bits=bits)
    assert report.padded == (40, 176)
    words = math.ceil(bits * 40 * 176 / 32) + math.ceil(40 / 32) + math.ceil(176 / 32) + 1
    assert report.bits_per_weight == pytest.approx(32 * words / (40 * 172))
    arrays, _ = to_arrays(matrix)
    assert 8 * sum(a.nbytes for a in arrays.values()) == matrix.stored_bits


def test_more_bits_lower_the_loss_towards_zero():
    w, h = problem()
    losses = [quantize(w, h, bits=bits)[1].proxy_loss for bits in (1, 2, 3, 4, 6, 8)]
    assert all(after < 0.5 * before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-4


def test_ldlq_beats_nearest_where_it_counts_and_loses_where_it_does_not():
    w, h = problem()
    (_, feedback), (_, nearest) = quantize(w, h), quantize(w, h, algorithm="nearest")
    assert feedback.proxy_loss < 0.8 * nearest.proxy_loss and feedback.weight_mse > nearest.weight_mse


def test_rotation_protects_from_outliers():
    w, h = problem()
    w[3, 7] = 100 * w.std()
    losses = {name: quantize(w, h, rotation=name, algorithm="nearest")[1].weight_mse for name in ("none", "hadamard")}
    assert losses["hadamard"] < 0.5 * losses["none"]


def test_searched_scale_is_the_best_of_its_candidates():
    w, h = problem()
    book = codebooks.make("half_integer", 2)
    candidates = (0.7, 0.9, 1.0, 1.3)
    searched = quantize(w, h, scale=ScaleRule("search", candidates=candidates))[1].proxy_loss
    fixed = [quantize(w, h, scale=ScaleRule("rms", rms=c * book.rms))[1].proxy_loss for c in candidates]
    assert searched == pytest.approx(min(fixed), rel=1e-5)


def test_the_key_is_the_layers_name():
    w, h = problem()
    words = lambda name: np.asarray(quantize(w, h, name=name)[0].packed)  # noqa: E731
    np.testing.assert_array_equal(words("a"), words("a"))
    assert np.any(words("a") != words("b"))


def test_dead_channels_and_no_calibration_at_all():
    w, h = problem()
    h[5], h[:, 5] = 0, 0
    matrix, report = quantize(w, h)
    assert report.dead_columns == 1 and np.all(np.isfinite(matrix.dequantize()))
    _, blind = quantize(w, np.zeros_like(h))
    assert blind.proxy_loss == 0 and blind.weight_mse < 0.2  # plain nearest rounding; no loss can be measured


def test_singular_hessians_are_damped_until_they_factor():
    w, _ = problem()
    rank_one = np.ones((64, 64), np.float32) + np.diag(np.full(64, -1e-3, np.float32))  # indefinite by rounding
    _, report = quantize(w, rank_one, damping=0.0)
    assert report.damping > 0 and math.isfinite(report.proxy_loss)


def test_an_output_factor_enters_the_reported_loss():
    w, h = problem()
    output = np.diag(np.linspace(0.1, 4, 48)).astype(np.float32)
    matrix, report = quantize(w, h, output=output)
    error = w - np.asarray(matrix.dequantize())
    loss = np.trace(output @ error @ h @ error.T) / np.trace(output @ w @ h @ w.T)
    assert report.proxy_loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("rule", [None, ScaleRule("rms", "row"), ScaleRule("rms", "group", 16)])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "kronecker"])
def test_serialisation_is_exact(rule, rotation):
    w, h = problem()
    matrix, _ = quantize(w, h, rotation=rotation, scale=rule)
    arrays, spec = to_arrays(matrix)
    back = from_arrays(arrays, spec, "test")
    assert jax.tree.structure(back) == jax.tree.structure(matrix)
    np.testing.assert_array_equal(back.dequantize(), matrix.dequantize())


def test_damaged_descriptions_are_refused():
    w, h = problem()
    arrays, spec = to_arrays(quantize(w, h)[0])
    with pytest.raises(ArtifactError, match="format version"):
        from_arrays(arrays, {**spec, "format": 99}, "layer x")
    with pytest.raises(ArtifactError, match="layer x.*damaged"):
        from_arrays({**arrays, "packed": arrays["packed"][:-1]}, spec, "layer x")
    own = {**spec["operator"], "codebook": {"name": "unheard_of", "bits": 2}}
    with pytest.raises(ArtifactError, match="does not have"):
        from_arrays(arrays, {**spec, "operator": own}, "layer x")


def test_bad_input_names_the_layer():
    w, h = problem()
    with pytest.raises(InputError, match=r"layer l7: the Hessian has shape \(32, 32\)"):
        quantize(w, h[:32, :32], name="l7")
    with pytest.raises(InputError, match=r"layer l7: a weight matrix has shape \[out, in\]"):
        quantize(w[0], h, name="l7")
    w[2, 3] = np.nan
    with pytest.raises(NumericsError, match=r"layer l7: the weight holds nan at \(2, 3\)"):
        quantize(w, h, name="l7")
    w[2, 3] = 0
    h[1, 1] = np.inf
    with pytest.raises(NumericsError, match="layer l7: the input Hessian holds inf"):
        quantize(w, h, name="l7")
    h[1, 1] = -1e6
    with pytest.raises(NumericsError, match=r"layer l7 .input factor.: the Hessian has 1 negative values"):
        quantize(w, h, name="l7")
    h[1, 1] = 1
    h[0, 1] = h[1, 0] = 1e6  # its least eigenvalue is about -1e6
    with pytest.raises(NumericsError, match="layer l7: the Hessian could not be factored"):
        quantize(w, h, name="l7")
