"""Coordinate-descent passes against the textbook loops, in float64, and what they may and may not do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, incoherence, quantize_matrix, rounding
from qjax.codebooks.scaling import ScaleRule, fit
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.rounding.descent import coupling, descend, split_codes
from qjax.rounding.losses import proxy_loss
from qjax.rounding.sweep import merge_codes


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def problem(seed=0, m=12, n=48):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * n, n)) @ (rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 10))
    return rng.standard_normal((m, n)), x.T @ x / len(x)


def damped(h, damping=0.01):
    return h / np.mean(np.diag(h)) + damping * np.eye(len(h))


def half_integer(x):
    return np.clip(np.floor(x + 2), 0, 3) - 1.5


def loss(w, values, h):
    error = w - np.asarray(values)
    return np.sum(error @ h * error, axis=1)  # of every row


def naive_greedy(w, h, start, passes, visits):
    """QuIP's update of one column after the other: ŵ_i ← Q(ŵ_i − (s·H_{:,i}) / H_ii), s = Ŵ − W."""
    out = start.copy()
    for _, i in itertools.product(range(passes), visits):
        out[:, i] = half_integer(out[:, i] - (out - w) @ h[:, i] / h[i, i])
    return out


def naive_blocks(w, h, start, passes, block, quantize, careful):
    """QuIP#'s update of one block after the other; `careful` keeps an old codeword where the new one is no better."""
    out = start.copy()
    for _, left in itertools.product(range(passes), reversed(range(0, w.shape[1], block))):
        b = slice(left, left + block)
        new = out.copy()
        new[:, b] = quantize(out[:, b] + (w - out) @ h[:, b] @ np.linalg.inv(h[b, b]))
        better = loss(w, new, h) < loss(w, out, h) if careful else np.ones(len(w), bool)
        out[better] = new[better]
    return out


def run(name, w, h, book, **options):
    method = rounding.make(name, **options)
    return jax.jit(lambda w, h: method(w, Hessian(h), book))(w, h)


@pytest.mark.parametrize(("order", "n"), [("natural", 97), ("descending", 48), ("descending", 640)])
def test_greedy_equals_the_textbook_loop(float64, n, order):
    w, h = problem(1, m=4, n=n)
    visits = np.arange(n)[::-1] if order == "natural" else np.argsort(np.diag(h))[::-1]
    rounded = run("greedy", w, h, codebooks.make("half_integer", 2), order=order, passes=3)
    np.testing.assert_array_equal(rounded.values, naive_greedy(w, damped(h), half_integer(w), 3, visits))
    np.testing.assert_array_equal(rounded.start, half_integer(w))


@pytest.mark.parametrize(("order", "passes"), [("natural", 1), ("ascending", 3)])
def test_passes_after_ldlq_equal_the_textbook_loop(float64, passes, order):
    w, h = problem(2, n=96)
    book = codebooks.make("half_integer", 2)
    start = np.asarray(run("ldlq", w, h, book, order=order).values)
    visits = np.arange(96)[::-1] if order == "natural" else np.argsort(np.diag(h))[::-1]
    rounded = run("ldlq", w, h, book, order=order, passes=passes)
    np.testing.assert_array_equal(rounded.start, start)
    np.testing.assert_array_equal(rounded.values, naive_greedy(w, damped(h), start, passes, visits))


@pytest.mark.parametrize(("block", "n"), [(8, 48), (16, 96), (8, 272)])
def test_block_passes_equal_the_textbook_loop(float64, block, n):
    w, h = problem(3, m=6, n=n)
    book = codebooks.make("half_integer", 2)
    start = np.asarray(run("ldlq", w, h, book, block=block).values)
    rounded = run("ldlq", w, h, book, block=block, passes=2)
    np.testing.assert_array_equal(
        rounded.values, naive_blocks(w, damped(h), start, 2, block, half_integer, careful=True)
    )


def test_lattice_passes_equal_the_textbook_loop(float64):
    w, h = problem(4)
    book = codebooks.make("d4", 2)
    start = np.asarray(run("ldlq", w, h, book).values, np.float64)

    def nearest(x):
        return np.asarray(book.dequantize(book.quantize(jnp.asarray(x))), np.float64)

    rounded = run("ldlq", w, h, book, passes=2)
    np.testing.assert_array_equal(rounded.values, naive_blocks(w, damped(h), start, 2, 4, nearest, careful=True))


def test_a_block_of_a_diagonal_hessian_is_coupled_to_nothing():
    h = np.diag(np.arange(1.0, 9.0, dtype=np.float32))
    matrix, factor = coupling(jnp.asarray(h), 4)
    np.testing.assert_array_equal(matrix, np.zeros((8, 8)))
    np.testing.assert_allclose(factor[1] @ factor[1].T, h[4:, 4:], rtol=1e-6)


@pytest.mark.parametrize(("name", "bits"), [("half_integer", 2), ("lloyd_max", 3), ("d4", 2), ("e8p", 2)])
def test_every_pass_lowers_the_loss_of_every_row_or_leaves_it(float64, name, bits):
    w, h = problem(5, m=32)
    h = damped(h)
    book = codebooks.make(name, bits)
    scaling = fit(jnp.asarray(w), book, ScaleRule())
    before = rounding.make("ldlq")(jnp.asarray(w), Hessian(jnp.asarray(h)), book, scaling=scaling)

    @jax.jit
    def better(codes):
        codes = split_codes(codes, 48 // book.tile[1])
        codes = descend(jnp.asarray(w), codes, jnp.asarray(h), book, scaling, passes=1, index=jnp.arange(48))
        return merge_codes(codes)

    codes, last = before.codes, loss(w, before.values, h)
    first = last.copy()
    for _ in range(4):
        codes = better(codes)
        now = loss(w, scaling.from_codebook_units(book.dequantize(codes).astype(float)), h)
        assert np.all(now <= last * (1 + 1e-12))
        last = now
    assert last.sum() < 0.97 * first.sum()


def test_a_fixed_point_is_coordinatewise_optimal(float64):
    """After the descent no single weight can move to any of the four levels and lower the loss."""
    w, h = problem(6)
    values = np.asarray(run("greedy", w, h, codebooks.make("half_integer", 2), passes=100).values)
    h = damped(h)
    least = loss(w, values, h)
    for column, level in itertools.product(range(48), (-1.5, -0.5, 0.5, 1.5)):
        moved = values.copy()
        moved[:, column] = level
        assert np.all(loss(w, moved, h) >= least * (1 - 1e-12))


def test_codes_and_scales_of_groups_follow_their_columns(float64):
    """With one scale per group of columns, a matrix in grouped units and the same matrix in plain units agree."""
    w, h = problem(7)
    stretch = np.repeat([1.0, 4.0, 0.5], 16)
    book = codebooks.make("half_integer", 2)
    scaling = fit(jnp.asarray(np.ones((12, 48)) * stretch), book, ScaleRule(granularity="group", group_size=16))
    units = np.asarray(scaling.from_codebook_units(jnp.ones((12, 48))))
    for name, options in (("greedy", {"passes": 4}), ("ldlq", {"order": "ascending", "passes": 2})):
        grouped = rounding.make(name, **options)(jnp.asarray(w * units), Hessian(jnp.asarray(h)), book, scaling=scaling)
        assert loss(w * units, grouped.values, damped(h)).sum() <= loss(w * units, grouped.start, damped(h)).sum()
        np.testing.assert_array_equal(
            grouped.values, scaling.from_codebook_units(book.dequantize(grouped.codes).astype(float))
        )


def test_passes_are_reported_with_the_loss_they_started_from():
    w, h = (x.astype(np.float32) for x in problem(8, m=20, n=50))  # padded by the rotation and by the tile
    common = {
        "codebook": codebooks.make("d4", 2),
        "incoherence": incoherence.make("hadamard"),
        "key": jax.random.key(1),
    }
    _, plain = quantize_matrix(w, Hessian(h), rounding=rounding.make("ldlq"), **common)
    matrix, report = quantize_matrix(w, Hessian(h), rounding=rounding.make("ldlq", passes=5), **common)
    assert plain.proxy_loss_before_passes is None
    assert report.proxy_loss_before_passes == pytest.approx(plain.proxy_loss, rel=1e-5)
    assert report.proxy_loss < 0.97 * report.proxy_loss_before_passes
    assert report.proxy_loss == pytest.approx(
        float(proxy_loss(jnp.asarray(w), matrix.dequantize(), Hessian(jnp.asarray(h)))), rel=1e-4
    )


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="passes is -1"):
        rounding.make("ldlq", passes=-1)
    with pytest.raises(InputError, match="passes is 0"):
        rounding.make("greedy", passes=0)
    with pytest.raises(InputError, match="natural, descending"):
        rounding.make("greedy", order="ascending")
    with pytest.raises(InputError, match="multiple of the codebook's tile width 4"):
        run("greedy", *problem(), codebooks.make("d4", 2), block=6)


@pytest.mark.parametrize(("name", "options"), [("greedy", {"passes": 2, "order": "natural"}), ("ldlq", {"passes": 3})])
def test_specs_make_the_same_algorithm(name, options):
    method = rounding.make(name, **options)
    assert rounding.make(**method.spec()) == method
