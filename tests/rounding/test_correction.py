"""The corrected target against the least-squares problem that defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import Hessian, codebooks, incoherence, quantize_matrix, rounding
from qjax.errors import InputError
from qjax.rounding.correction import corrected_weight


def streams(tokens=4000, n=24, m=16, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, n)) @ rng.standard_normal((n, n))
    z = x @ (np.eye(n) + 0.1 * rng.standard_normal((n, n))) + noise * rng.standard_normal((tokens, n))
    return rng.standard_normal((m, n)), x, z


def moments(x, z, dtype=np.float64):
    return Hessian((z.T @ z / len(x)).astype(dtype), cross=(x.T @ z / len(x)).astype(dtype))


def test_the_full_correction_is_the_least_squares_map():
    with jax.enable_x64(True):
        w, x, z = streams()
        found = corrected_weight(jnp.asarray(w), moments(x, z), 1.0, 1e-12)
        best, *_ = np.linalg.lstsq(z, x @ w.T, rcond=None)
        np.testing.assert_allclose(found, best.T, atol=1e-6)


def test_half_the_correction_lies_half_way_and_none_changes_nothing():
    with jax.enable_x64(True):
        w, x, z = streams()
        full = corrected_weight(jnp.asarray(w), moments(x, z), 1.0, 0.01)
        half = corrected_weight(jnp.asarray(w), moments(x, z), 0.5, 0.01)
        np.testing.assert_allclose(half, (w + np.asarray(full)) / 2, atol=1e-10)
        np.testing.assert_array_equal(corrected_weight(jnp.asarray(w), moments(x, z), 0.0, 0.01), w)


def test_equal_streams_need_no_correction_and_dead_channels_are_harmless():
    w, x, _ = streams()
    x[:, 3] = 0
    found = np.asarray(corrected_weight(jnp.asarray(w, jnp.float32), moments(x, x, np.float32), 1.0, 0.01))
    np.testing.assert_allclose(found, w, atol=1e-4)


def test_quantising_the_corrected_target_brings_the_outputs_closer():
    w, x, z = streams()
    options = {
        "codebook": codebooks.make("half_integer", 4),
        "rounding": rounding.make("ldlq"),
        "incoherence": incoherence.make("hadamard"),
        "key": jax.random.key(0),
    }
    errors = {}
    for strength in (0.0, 1.0):
        matrix, report = quantize_matrix(
            w.astype(np.float32), moments(x, z, np.float32), correction=strength, **options
        )
        errors[strength] = np.mean(np.square(x @ w.T - z @ np.asarray(matrix.dequantize()).T))
        assert (report.correction > 0) == (strength > 0)
    assert errors[1.0] < 0.5 * errors[0.0]


def test_a_cross_moment_of_another_shape_is_refused():
    w, _x, z = streams()
    wrong = Hessian((z.T @ z).astype(np.float32), cross=np.zeros((3, 3), np.float32))
    with pytest.raises(InputError, match="layer odd: the cross moment has shape"):
        quantize_matrix(
            w.astype(np.float32),
            wrong,
            codebook=codebooks.make("half_integer", 2),
            rounding=rounding.make("nearest"),
            incoherence=incoherence.make("none"),
            key=jax.random.key(0),
            name="odd",
        )
