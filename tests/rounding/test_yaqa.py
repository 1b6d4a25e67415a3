"""Two-sided rounding against the definition: a naive triple product per tile, and a sweep by row blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks, rounding
from qjax.codebooks.scaling import ScaleRule, fit, identity
from qjax.errors import InputError, NumericsError
from qjax.hessian import Hessian
from qjax.incoherence.families import make as incoherence
from qjax.linalg.damping import damped_factor, unit_mean_diagonal
from qjax.matrix.quantize import quantize_matrix
from qjax.rounding import two_sided
from qjax.rounding.losses import proxy_loss
from qjax.rounding.two_sided import two_sided_codes

BOOKS = {"half_integer": {}, "e8p": {}, "trellis": {"L": 6, "code": "3inst"}}
SHAPES = {"wide": (48, 96), "tall": (96, 48)}
ROWS = 16


def power_law(rng, n, exponent=1.0):
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return ((q * np.arange(1, n + 1) ** -exponent) @ q.T * n).astype(np.float32)


@functools.cache
def problem(name, shape, seed=0):
    rng = np.random.default_rng(seed)
    m, n = SHAPES[shape]
    book = codebooks.make(name, 2, **BOOKS[name])
    w = jnp.asarray(rng.standard_normal((m, n)).astype(np.float32)) * np.float32(book.rms)
    h = Hessian(jnp.asarray(power_law(rng, n)), jnp.asarray(power_law(rng, m)))
    right, left = damped_factor(h.input, 0.01, book.tile[1]), damped_factor(h.output, 0.01, ROWS)
    return w, h, book, right, left


def joined(tiles, rows, columns):
    return np.concatenate([np.concatenate([tiles[i, j] for j in range(columns)], 1) for i in range(rows)], 0)


def encoder(book):
    return jax.jit(lambda t: (lambda codes: (codes, book.dequantize(codes)))(book.quantize(t)))


def naive(w, right, left, book):
    """Every tile's target by the definition, tile by tile from the bottom right corner, in float64."""
    w, width, encode = np.asarray(w, np.float64), book.tile[1], encoder(book)
    m, n = w.shape
    li, lo = np.asarray(right.lower, np.float64) - np.eye(n), np.asarray(left.lower, np.float64) - np.eye(m)
    error, tiles = np.zeros((m, n)), {}
    for i in reversed(range(m // ROWS)):
        for j in reversed(range(n // width)):
            r, c = slice(i * ROWS, (i + 1) * ROWS), slice(j * width, (j + 1) * width)
            target = w[r, c] + lo.T[r] @ error @ li[:, c] + lo.T[r] @ error[:, c] + error[r] @ li[:, c]
            codes, values = encode(jnp.asarray(target, jnp.float32))
            error[r, c], tiles[i, j] = w[r, c] - np.asarray(values), np.asarray(codes)
    return joined(tiles, m // ROWS, n // width)


def by_row_blocks(w, right, left, book):
    """Row block by row block from the bottom; each an ordinary sweep over columns, its targets shifted by L_out'ᵀ G."""
    w, width, encode = np.asarray(w, np.float64), book.tile[1], encoder(book)
    m, n = w.shape
    li, lo = np.asarray(right.lower, np.float64), np.asarray(left.lower, np.float64)
    g, tiles = np.zeros((m, n)), {}
    for i in reversed(range(m // ROWS)):
        r, below = slice(i * ROWS, (i + 1) * ROWS), slice((i + 1) * ROWS, m)
        shift, error = lo[below, r].T @ g[below], np.zeros((ROWS, n))
        for j in reversed(range(n // width)):
            c, after = slice(j * width, (j + 1) * width), slice((j + 1) * width, n)
            target = w[r, c] + shift[:, c] + error[:, after] @ li[after, c]
            codes, values = encode(jnp.asarray(target, jnp.float32))
            error[:, c], tiles[i, j] = w[r, c] - np.asarray(values), np.asarray(codes)
        g[r] = error @ li
    return joined(tiles, m // ROWS, n // width)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOOKS)
def test_the_wavefront_is_the_definition(name, shape):
    w, h, book, right, left = problem(name, shape)
    codes = np.asarray(rounding.make("yaqa", rows=ROWS, output_damping=None)(w, h, book).codes)
    np.testing.assert_array_equal(codes, naive(w, right, left, book))
    np.testing.assert_array_equal(codes, by_row_blocks(w, right, left, book))


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("name", BOOKS)
def test_chunks_change_nothing(name, chunk):
    w, _, book, right, left = problem(name, "wide")
    codes = [
        two_sided_codes(w, right.lower, left.lower, book, identity(), rows=ROWS, block=book.tile[1], chunk=size)
        for size in (chunk, 32)
    ]
    np.testing.assert_array_equal(*codes)


@pytest.mark.parametrize(("tile", "field"), [((16, 48), 48), ((32, 16), 32), ((48, 24), 96), ((96, 48), 96)])
@pytest.mark.parametrize("name", ["half_integer", "e8p"])
def test_fields_and_tiles_change_nothing(name, tile, field, monkeypatch):
    """Several fields with products between them, and up to six row blocks that follow each other through a tile."""
    w, _, book, right, left = problem(name, "tall")
    monkeypatch.setattr(two_sided, "_FIELD", field)
    monkeypatch.setattr(two_sided, "tile_shape", lambda *_: tile)
    codes = two_sided_codes(w, right.lower, left.lower, book, identity(), rows=ROWS, block=book.tile[1], chunk=2)
    np.testing.assert_array_equal(codes, naive(w, right, left, book))


@pytest.mark.parametrize("name", BOOKS)
def test_without_an_output_factor_it_is_ldlq(name):
    w, h, book, _, _ = problem(name, "wide")
    one, ldlq = Hessian(h.input), rounding.make("ldlq")
    found, expected = rounding.make("yaqa")(w, one, book), ldlq(w, one, book)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.output_damping is None
    identical = Hessian(h.input, jnp.eye(w.shape[0]) * 3)
    np.testing.assert_array_equal(rounding.make("yaqa")(w, identical, book).codes, expected.codes)


@pytest.mark.parametrize("granularity", ["row", "group"])
def test_scales_per_row_and_per_group(granularity):
    """With H_out = I the affine grid gives LDLQ's codes, whatever varies over the matrix."""
    w, h, *_ = problem("half_integer", "wide")
    w = w * jnp.linspace(0.5, 2, w.shape[0]).reshape(-1, 1)
    book = codebooks.make("grid", 2)
    rule = ScaleRule("minmax", granularity, group_size=24 if granularity == "group" else None)
    scaling = fit(w, book, rule)
    expected = rounding.make("ldlq")(w, Hessian(h.input), book, scaling=scaling)
    found = rounding.make("yaqa", rows=8)(w, Hessian(h.input, jnp.eye(w.shape[0])), book, scaling=scaling)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize("name", BOOKS)
def test_the_loss_is_that_of_the_residuals(name):
    """`tr(H_out E H_in Eᵀ) = tr(D_out η D_in ηᵀ)` with η = L_outᵀ E L_in, what the tiles were rounded by."""
    w, h, book, right, left = problem(name, "wide")
    error = np.asarray(w - rounding.make("yaqa", rows=ROWS)(w, h, book).values, np.float64)
    li, lo = np.asarray(right.lower, np.float64), np.asarray(left.lower, np.float64)
    eta = lo.T @ error @ li

    def block_diagonal(blocks):
        size, width = len(blocks) * blocks.shape[1], blocks.shape[1]
        result = np.zeros((size, size))
        for k, block in enumerate(blocks):
            result[k * width : (k + 1) * width, k * width : (k + 1) * width] = block
        return result

    by_residuals = np.sum(
        (block_diagonal(np.asarray(left.diagonal, np.float64)) @ eta)
        * (eta @ block_diagonal(np.asarray(right.diagonal, np.float64)))
    )
    damped = [
        np.asarray(unit_mean_diagonal(x)[0], np.float64) + float(f.damping) * np.eye(len(x))
        for x, f in ((h.output, left), (h.input, right))
    ]
    np.testing.assert_allclose(by_residuals, np.sum((damped[0] @ error) * (error @ damped[1])), rtol=2e-4)
    # What each tile was rounded by is within the codebook's reach: the residual of a 2-bit code of unit variance.
    assert 0.05 < np.mean(eta**2) / book.rms**2 < 0.3


@pytest.mark.parametrize("name", BOOKS)
def test_it_lowers_the_two_sided_loss_and_not_the_one_sided(name):
    ratios, one_sided = [], []
    for seed in range(3):
        w, h, book, *_ = problem(name, "wide", seed)
        two, one = (rounding.make(a)(w, h, book).values for a in ("yaqa", "ldlq"))
        ratios.append(float(proxy_loss(w, two, h) / proxy_loss(w, one, h)))
        alone = Hessian(h.input)
        one_sided.append(float(proxy_loss(w, two, alone) / proxy_loss(w, one, alone)))
    assert np.max(ratios) < 0.85
    assert np.min(one_sided) > 1  # LDLQ is better at its own loss: the gain is in H_out, not in a better search


def test_rows_of_one_feed_back_more():
    """The exact row feedback of a scalar codebook is a little better than blocks of 16 rows."""
    w, h, book, *_ = problem("half_integer", "wide")
    fine, coarse = (float(proxy_loss(w, rounding.make("yaqa", rows=r)(w, h, book).values, h)) for r in (1, 16))
    assert fine < coarse


def test_through_quantize_matrix_with_incoherence_on_both_sides():
    w, h, book, *_ = problem("e8p", "tall")
    options = {"codebook": book, "incoherence": incoherence("hadamard"), "key": jax.random.key(0), "damping": 0.02}
    matrix, report = quantize_matrix(w, h, rounding=rounding.make("yaqa", output_damping=0.05), **options)
    assert report.damping == pytest.approx(0.02) and report.output_damping == pytest.approx(0.05)
    dense = matrix.dequantize()
    assert float(proxy_loss(w, dense, h)) == pytest.approx(report.proxy_loss, rel=1e-4)
    _, ldlq = quantize_matrix(w, h, rounding=rounding.make("ldlq"), **options)
    assert report.proxy_loss < 0.9 * ldlq.proxy_loss and ldlq.output_damping is None


def test_errors_say_what_is_wrong():
    w, h, book, *_ = problem("half_integer", "wide")
    with pytest.raises(InputError, match=r"rounding.rows is 7; it must be a multiple .* divide the 48 rows"):
        rounding.make("yaqa", rows=7)(w, h, book)
    with pytest.raises(InputError, match=r"output Hessian has shape \(96, 96\) .* is \[48, 48\]"):
        rounding.make("yaqa")(w, Hessian(h.input, h.input), book)
    with pytest.raises(InputError, match="rounding.chunk is 0"):
        rounding.make("yaqa", chunk=0)
    with pytest.raises(InputError, match="rounding.output_damping is -1"):
        rounding.make("yaqa", output_damping=-1.0)
    broken = np.array(h.output)
    broken[3, 4] = np.nan
    with pytest.raises(NumericsError, match="output Hessian holds nan at \\(3, 4\\)"):
        quantize_matrix(
            w,
            Hessian(h.input, broken),
            codebook=book,
            rounding=rounding.make("yaqa"),
            incoherence=incoherence("none"),
            key=jax.random.key(0),
        )
