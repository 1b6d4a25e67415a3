"""Steps of codes against what can be worked out by hand: quadratics, brute force over all codewords."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import codebooks
from qjax.codebooks.scaling import Scaling
from qjax.finetune.discrete import downhill, largest, moved, nearest, smoothness, straight_through, tiled

SCALE = np.float32(0.5)
SCALING = Scaling(unit=jnp.float32(SCALE))


def values_of(codes, book):
    return SCALING.from_codebook_units(book.dequantize(codes))


@functools.cache
def codewords(name):
    """All codewords `[count, dim]`, in the order of their codes."""
    book = codebooks.make(name, 2)
    count = 2 ** (2 * book.tile[1])
    codes = jnp.arange(count, dtype=jnp.uint16 if count > 256 else jnp.uint8).reshape(count, 1)
    return book, np.asarray(book.dequantize(codes))


def quadratic(seed, rows, columns):
    """(t, H): a target and a Hessian with correlated columns; `φ(x) = ½ tr((x − t) H (x − t)ᵀ)`."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) + 0.3
    hessian = mix @ mix.T / columns + 0.1 * np.eye(columns)
    target = rng.standard_normal((rows, columns)) * SCALE
    return target.astype(np.float32), hessian.astype(np.float32)


def loss_of(x, target, hessian):
    error = np.asarray(x, np.float64) - target
    return 0.5 * float(np.sum(error @ hessian * error))


def test_the_gradient_goes_straight_through_and_the_value_is_the_codeword():
    book, words = codewords("half_integer")
    rng = np.random.default_rng(0)
    z, target = rng.standard_normal((2, 4, 6)).astype(np.float32)

    def loss(z):
        q = straight_through(z, values_of(nearest(z, SCALING, book), book))
        return 0.5 * jnp.sum(jnp.square(q - target)), q

    (_, q), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(z))
    levels = words[:, 0] * SCALE
    by_hand = levels[np.argmin(np.abs(z[..., None] - levels), axis=-1)]
    np.testing.assert_array_equal(np.asarray(q), by_hand)
    np.testing.assert_array_equal(np.asarray(gradient), by_hand - target)


def test_straight_through_training_beats_rounding_on_a_quadratic():
    book, _ = codewords("half_integer")
    target, hessian = quadratic(1, 8, 16)

    def step(z, _):
        q = values_of(nearest(z, SCALING, book), book)
        return z - np.float32(0.0003) * jnp.matmul(q - target, hessian), q

    points = jax.jit(lambda z: jax.lax.scan(step, z, None, length=400)[1])(jnp.asarray(target))
    losses = [loss_of(q, target, hessian) for q in points]
    assert min(losses) < 0.75 * losses[0]  # the first is rounding to nearest


@pytest.mark.parametrize("name", ["half_integer", "e8p"])
def test_a_step_moves_the_largest_tiles_to_the_nearest_codewords_and_no_others(name):
    book, words = codewords(name)
    rows, columns, count, kept, rate = 6, 32, 9, 7, np.float32(0.3)
    target, hessian = quadratic(2, rows, columns)
    codes = nearest(jnp.asarray(target), SCALING, book)
    values = np.asarray(values_of(codes, book))
    gradient = (values - target) @ hessian
    chosen = largest(jnp.asarray(gradient), book.tile, count)
    new = moved(codes, jnp.asarray(values), jnp.asarray(gradient), float(rate), chosen, kept, SCALING, book)

    width = book.tile[1]
    pieces = gradient.reshape(-1, width)  # tiles of one row lie one after another
    order = np.argsort(-np.sum(pieces**2, axis=1), kind="stable")[:count]
    np.testing.assert_array_equal(np.sort(order), np.sort(np.asarray(chosen)))
    wanted = (values - rate * gradient).reshape(-1, width) / SCALE
    expected = values.reshape(-1, width).copy()
    for tile in np.asarray(chosen)[:kept]:
        expected[tile] = words[np.argmin(np.sum((words - wanted[tile]) ** 2, axis=1))] * SCALE
    np.testing.assert_array_equal(np.asarray(values_of(new, book)).reshape(-1, width), expected)
    outside = np.setdiff1d(np.arange(len(pieces)), np.asarray(chosen)[:kept])
    np.testing.assert_array_equal(np.asarray(new).reshape(-1)[outside], np.asarray(codes).reshape(-1)[outside])
    assert np.asarray(new).dtype == np.asarray(codes).dtype and np.asarray(new).max() < len(words)
    again = book.unpack(book.pack(new), (rows, columns))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(new))


@pytest.mark.parametrize("name", ["half_integer", "e8p"])
def test_steps_of_a_few_codes_lower_a_quadratic(name):
    """As `pv.move_codes` does: the step of the subspace's smoothness, kept where the loss falls."""
    book, _ = codewords(name)
    target, hessian = quadratic(3, 16, 64)
    codes = nearest(jnp.asarray(target), SCALING, book)
    tiles = target.size // book.tile[1]
    count = tiles // 8

    def slope(codes, kept):
        values = values_of(codes, book)
        gradient = jnp.matmul(values - target, hessian)
        chosen = largest(gradient, book.tile, count)
        direction = downhill(gradient, book.tile, chosen, kept)
        return values, gradient, chosen, direction, smoothness({"x": direction}, {"x": jnp.matmul(direction, hessian)})

    slope = jax.jit(slope)
    step = jax.jit(lambda *parts: (new := moved(*parts, SCALING, book), values_of(new, book)))
    losses = [loss_of(values_of(codes, book), target, hessian)]
    for _ in range(30):
        for kept in (count, count // 4, 1):
            values, gradient, chosen, direction, curvature = slope(codes, np.int32(kept))
            d = np.asarray(direction, np.float64)
            assert np.sum(np.any(d.reshape(tiles, -1) != 0, axis=1)) == kept
            np.testing.assert_allclose(curvature, np.sum(d @ hessian * d) / np.sum(d * d), rtol=1e-4)
            new, after = step(codes, values, gradient, 1 / curvature, chosen, np.int32(kept))
            assert np.sum(np.any(np.asarray(after != values).reshape(tiles, -1), axis=1)) <= kept
            if (found := loss_of(after, target, hessian)) < losses[-1]:
                codes = new
                losses.append(found)
                break
        else:
            break
    assert len(losses) > 5 and losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize(("name", "bits", "options"), [("trellis", 2, {"L": 6}), ("e8p_rvq", 3, {})])
def test_tiles_of_any_codebook_move_and_the_others_stay(name, bits, options):
    book = codebooks.make(name, bits, **options)
    target, hessian = quadratic(4, 32, 48)
    codes = nearest(jnp.asarray(target), SCALING, book)
    values = values_of(codes, book)
    gradient = (np.asarray(values) - target) @ hessian
    chosen = largest(jnp.asarray(gradient), book.tile, 3)
    new = moved(codes, values, jnp.asarray(gradient), 1.0, chosen, 2, SCALING, book)
    assert new.shape == codes.shape and new.dtype == codes.dtype
    before, after = (np.asarray(tiled(values_of(c, book), book.tile)) for c in (codes, new))
    different = np.flatnonzero(np.any(before != after, axis=(1, 2)))
    assert set(different) == set(np.asarray(chosen)[:2].tolist())
    np.testing.assert_array_equal(np.asarray(book.unpack(book.pack(new), (32, 48))), np.asarray(new))


def test_tiles_are_those_of_the_matrix_row_by_row():
    x = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    found = np.asarray(tiled(jnp.asarray(x), (2, 3)))
    np.testing.assert_array_equal(found, [x[:2, :3], x[:2, 3:], x[2:, :3], x[2:, 3:]])
