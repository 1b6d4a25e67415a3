"""Attention and its derivative against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.attention import attend

ROWS, QUERIES, KEYS, DIM = 2, 6, 5, 4
MASKS = {
    "causal": np.tile(np.tril(np.ones((3, KEYS), bool), 2), (2, 1)),
    "window": np.tril(np.ones((QUERIES, KEYS), bool)) & ~np.tril(np.ones((QUERIES, KEYS), bool), -3),
}


def arrays():
    rng = np.random.default_rng(0)
    shapes = (ROWS, QUERIES, DIM), (ROWS, KEYS, DIM), (ROWS, KEYS, DIM), (ROWS, QUERIES, DIM)
    return [rng.standard_normal(shape) for shape in shapes]


def expected(q, k, v, gradient, visible):
    """(output, gradients in q, k and v): the softmax' derivative as a full Jacobian, diag p - p pᵀ."""
    scores = np.where(visible, q @ k.transpose(0, 2, 1) / np.sqrt(DIM), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    jacobian = np.einsum("bqi,ij->bqij", p, np.eye(KEYS)) - np.einsum("bqi,bqj->bqij", p, p)
    toward = np.einsum("bqij,bqj->bqi", jacobian, gradient @ v.transpose(0, 2, 1)) / np.sqrt(DIM)
    return p @ v, (toward @ k, toward.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ gradient)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1.5e-2)])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_derivative(mask, dtype, error):
    visible = MASKS[mask]
    given = [jnp.asarray(a, dtype) for a in arrays()]
    output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, visible, q.shape[2] ** -0.5), *given[:3])
    found = output, *pull(given[3])
    exact_output, exact = expected(*(np.asarray(a, np.float64) for a in given), visible)
    for value, target in zip(found, (exact_output, *exact), strict=True):
        assert value.dtype == jnp.dtype(dtype)
        gap = np.linalg.norm(np.asarray(value, np.float64) - target) / np.linalg.norm(target)
        assert gap < error


def test_what_is_kept_for_the_derivative():
    """One array of the size of the scores, in the dtype of the operands."""
    given = [jnp.asarray(a, jnp.bfloat16) for a in arrays()]
    kept = jax.tree.leaves(jax.vjp(lambda q, k, v: attend(q, k, v, MASKS["causal"], q.shape[2] ** -0.5), *given[:3])[1])
    large = [leaf.dtype for leaf in kept if leaf.shape == (ROWS, QUERIES, KEYS)]
    assert large == [jnp.bfloat16]
