"""Losses in chunks: their values and gradients against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.finetune.losses import chunked_mean, next_token, soft_targets, topk_targets


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((7, 5), (11, 5), (7, 11)))


def per_position(head, x, target, constants):
    return soft_targets(x @ head.T * constants["scale"], target["teacher"])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_do_not_change_value_or_gradient(arrays, chunk):
    x, head, teacher = arrays
    constants = {"scale": jnp.float32(0.7)}

    def plain(head, x):
        return jnp.mean(per_position(head, x, {"teacher": teacher}, constants))

    def chunked(head, x):
        return chunked_mean(per_position, chunk, head, x, {"teacher": teacher}, constants)

    np.testing.assert_allclose(np.asarray(chunked(head, x)), np.asarray(plain(head, x)), rtol=1e-5)
    expected = jax.grad(lambda *a: 3 * plain(*a), (0, 1))(head, x)
    found = jax.jit(jax.grad(lambda *a: 3 * chunked(*a), (0, 1)))(head, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


def test_soft_targets_are_the_divergence(arrays):
    x, head, teacher = arrays
    own = x @ head.T
    expected = optax.kl_divergence(jax.nn.log_softmax(own, -1), jax.nn.softmax(teacher, -1))
    np.testing.assert_allclose(np.asarray(soft_targets(own, teacher)), np.asarray(expected), atol=1e-5)
    np.testing.assert_allclose(np.asarray(soft_targets(own, own)), 0, atol=1e-6)


def test_topk_is_a_lower_bound_that_becomes_exact(arrays):
    x, head, teacher = arrays
    own, log_p = x @ head.T, jax.nn.log_softmax(teacher, -1)
    whole = np.asarray(soft_targets(own, teacher))
    before = np.zeros(7)
    for k in (1, 4, 10):
        values, index = jax.lax.top_k(log_p, k)
        bound = np.asarray(topk_targets(own, index, values))
        assert np.all(bound >= before - 1e-5) and np.all(bound <= whole + 1e-5)
        before = bound
    np.testing.assert_allclose(before, whole, atol=1e-4)  # ten of eleven and the rest are all of them


def test_next_token_is_the_cross_entropy(arrays):
    x, head, _ = arrays
    target = jnp.arange(7, dtype=jnp.int32)
    expected = optax.softmax_cross_entropy_with_integer_labels(x @ head.T, target)
    np.testing.assert_allclose(np.asarray(next_token(x @ head.T, target)), np.asarray(expected), rtol=1e-5)
