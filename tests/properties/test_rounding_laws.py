"""Laws that every registered rounding obeys with every registered codebook it accepts.

A new algorithm or codebook is covered by being registered; combinations it refuses must be refused with an InputError.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.rounding.base import check_shapes
from qjax.rounding.losses import proxy_loss

OUT, IN = 32, 64
NEEDS_KEY = {"stochastic", "ldlq_guarded"}


@functools.cache
def book(name):
    """The codebook at the smallest bit width it has."""
    for bits in (2, 1, 3, 4):
        try:
            return codebooks.make(name, bits)
        except InputError:
            continue
    raise AssertionError(f"codebook {name} has none of 1 to 4 bits")


@functools.cache
def problem(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * IN, IN)) @ (rng.standard_normal((IN, IN)) * np.exp(-np.arange(IN) / 16)[:, None])
    return rng.standard_normal((OUT, IN)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


@functools.cache
def compiled(algorithm, name):
    method, codebook = rounding.make(algorithm), book(name)
    return jax.jit(lambda w, h: method(w, Hessian(h), codebook, key=jax.random.key(7)))


def run(algorithm, name, w, h):
    try:
        return compiled(algorithm, name)(w * np.float32(book(name).rms), h)
    except InputError as error:
        refusal = str(error)
    assert "use" in refusal or "needs" in refusal
    pytest.skip(f"refused: {refusal}")


NAMES = sorted({book(name).spec()["name"] for name in codebooks.CODEBOOKS})  # without names that stand for others
PAIRS = [(a, c) for a in sorted(rounding.ROUNDINGS) for c in NAMES]
pairs = pytest.mark.parametrize(("algorithm", "name"), PAIRS)


@pairs
def test_values_are_the_decoded_codes(algorithm, name):
    w, h = problem()
    result = run(algorithm, name, w, h)
    assert bool(result.ok) and np.all(np.isfinite(result.values))
    assert result.permutation is None
    np.testing.assert_array_equal(result.values, book(name).dequantize(result.codes))
    packed = book(name).pack(result.codes)
    assert packed.shape == (-(-int(book(name).bits * OUT * IN) // 32),)
    np.testing.assert_array_equal(book(name).unpack(packed, (OUT, IN)), result.codes)


@pairs
def test_the_scale_of_the_hessian_has_no_meaning(algorithm, name):
    w, h = problem()
    first = run(algorithm, name, w, h)
    np.testing.assert_array_equal(first.codes, run(algorithm, name, w, h * np.float32(2.0**-9)).codes)


@pairs
def test_without_correlations_feedback_rounds_to_the_nearest(algorithm, name):
    if algorithm in NEEDS_KEY:
        pytest.skip("randomised")
    w, _ = problem()
    identity = np.eye(IN, dtype=np.float32) * 3
    nearest = run("nearest", name, w, identity)
    np.testing.assert_array_equal(run(algorithm, name, w, identity).codes, nearest.codes)


@pairs
def test_rows_are_rounded_independently(algorithm, name):
    """Permuting the rows permutes the codes (the reason that rows can be sharded)."""
    if algorithm in NEEDS_KEY or book(name).tile[0] > 1:
        pytest.skip("randomised, or rows are coded jointly")
    w, h = problem()
    order = np.random.default_rng(1).permutation(OUT)
    np.testing.assert_array_equal(
        run(algorithm, name, w[order], h).codes, np.asarray(run(algorithm, name, w, h).codes)[order]
    )


@pairs
def test_the_same_inputs_give_the_same_codes(algorithm, name):
    w, h = problem()
    np.testing.assert_array_equal(run(algorithm, name, w, h).codes, run(algorithm, name, w.copy(), h.copy()).codes)


@pytest.mark.parametrize("algorithm", sorted(set(rounding.ROUNDINGS) - {"nearest"} - NEEDS_KEY))
@pytest.mark.parametrize("name", NAMES)
def test_feedback_beats_nearest_on_correlated_inputs(algorithm, name):
    losses = {"nearest": 0.0, algorithm: 0.0}
    for seed in range(3):
        w, h = problem(seed)
        for key in losses:
            values = run(key, name, w, h).values
            losses[key] += float(
                proxy_loss(jnp.asarray(w * np.float32(book(name).rms)), values, Hessian(jnp.asarray(h)))
            )
    assert losses[algorithm] < 0.9 * losses["nearest"]


@pairs
def test_zero_weights_stay_finite(algorithm, name):
    _, h = problem()
    assert np.all(np.isfinite(run(algorithm, name, np.zeros((OUT, IN), np.float32), h).values))


@pytest.mark.parametrize("algorithm", sorted(rounding.ROUNDINGS))
def test_shapes_that_do_not_fit_are_refused(algorithm):
    w, h = problem()
    with pytest.raises(InputError, match="Hessian has shape"):
        rounding.make(algorithm)(
            jnp.asarray(w), Hessian(jnp.asarray(h[:8, :8])), book("half_integer"), key=jax.random.key(0)
        )
    with pytest.raises((InputError, jaxtyping.TypeCheckError), match="shape|out in"):  # annotations are checked first
        rounding.make(algorithm)(
            jnp.asarray(w[0]), Hessian(jnp.asarray(h)), book("half_integer"), key=jax.random.key(0)
        )
    with pytest.raises(InputError, match=r"shape \[out, in\]"):  # and the check that users meet
        check_shapes(jnp.asarray(w[0]), Hessian(jnp.asarray(h)), book("half_integer"))


def test_unknown_names_list_what_exists():
    with pytest.raises(InputError, match="gptq.*ldlq.*nearest"):
        rounding.make("gtpq")
    with pytest.raises(InputError, match="block.*order"):
        rounding.make("ldlq", blocks=8)
